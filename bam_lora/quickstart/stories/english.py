"""English stories: articles, pronouns and the plots.

The cast: H the hero, F a friend, K one of the hero's family, M a master of a trade, N another one, A an animal, T a
thing. `{a T}` and `{the T}` put an article, `{a+ T}` a describing word as well; `{H.he}`, `{K.his}` are pronouns.
"""

from __future__ import annotations

import random

from bam_lora.quickstart.stories import english_words as lexicon
from bam_lora.quickstart.stories.weave import Weaver

Cast = dict[str, str]

RULES = {
    "opening": [
        "Once upon a time there was a {H.child} (named|called) {H}, who lived in {a place} {where}.",
        "{H} lived with {H.his} {K} in {a place} {where}.",
        "In {a place} {where} there lived a {H.child} (named|called) {H}.",
        "(Long ago|Many years ago) a {H.child} (named|called) {H} lived in {a place} {where}.",
        "{where}, in {a place}, lived {H} with {H.his} {K} and (two hens|five sheep|a sleepy cat|an old dog).",
    ],
    "glad": [
        "{H} (laughed|smiled) and (clapped {H.his} hands|jumped for joy|danced around the room).",
        "{H} was so happy that {H.he} (sang all day long|forgot how tired {H.he} was|could not sleep that night).",
        "{H} had never been so (proud|happy|glad) before.",
    ],
    "sad": [
        "{H} (sat down on a stone|hid {H.his} face) and (cried|wept).",
        "{H} was so sad that {H.he} (could not eat|did not say a word for hours).",
    ],
    "tears": [
        "{H} (leaned against a tree|sat down on a log) and wept.",
        "Tears ran down {H}'s cheeks, and {H.he} did not know what to do.",
    ],
    "feast": [
        "In the evening they all sat (by the fire|at the long table) and ate {food}.",
        "Then {K.the} made {food}, and there was enough for everybody.",
        "That night they shared {food} and talked until the (candle|fire|lamp) went out.",
    ],
    "end": [
        "And whenever {H} passed (that place|the spot) again, {H.he} had to smile.",
        "{H} never forgot that day.",
        "Since then {H} has always (kept {H.his} promises|helped those who asked|looked twice before {H.he} spoke).",
        '"(A small deed|A kind word) is never lost," said {K.the}, and {H} knew that it was true.',
        "And if you go there today, people will still tell you (this story|about {H}).",
    ],
    "friends": [
        "From that day on {H} and {F} were the best of friends.",
        "{H} and {F} (often spoke of it|still laughed about it) when they were old.",
    ],
    "hurry": [
        "{H} (put on {H.his} coat|pulled on {H.his} boots) and ran (to the door|down the hill|out into the street).",
        "Without another word {H} (took {H.his} bag and left|ran off as fast as {H.he} could).",
        "There was no time to lose, so {H} (ran all the way|took the short way across the fields).",
    ],
    "hard_rain": [
        "The path was slippery, and soon {H.his} shoes were full of water.",
    ],
    "hard_snow": [
        "The snow reached up to {H.his} knees, and {H.his} fingers were stiff with cold.",
    ],
    "hard_wind": [
        "The wind pushed {H.him} back at every step and pulled at {H.his} (hat|hair|sleeves).",
    ],
    "hard_sun": [
        "The sun burned on {H.his} (neck|head), and there was no shade (on the road|anywhere).",
    ],
    "hard_fog": [
        "{H} could hardly see {H.his} own (feet|hands), and twice {H.he} took the wrong turn.",
    ],
}

PLOTS: dict[str, tuple[str, ...]] = {
    "lost": (
        "<opening> {H.his} dearest (treasure|possession) was {a+ T} that {K.the} had given {H.him} for {H.his}"
        " birthday.",
        "<sky> {H} had taken {the T} along (to the market|to school|to the fields), but (on the way home|at noon|when"
        " {H.he} came home) {H.his} (bag|satchel) was empty. (<sad>|<tears>)",
        '"Where did you have it last?" asked {K.the}. "(I think it was {spot}|I was playing {spot}|I fell {spot}),"'
        " said {H}. <hurry> (<hard>|)",
        "{H.he} looked {spot} and {spot2}, but found only (wet leaves|an old shoe|a broken cup|a rusty nail).",
        'Then {H.he} met {M.the}, who was (carrying {M.new}|coming from the {M.shop}). "(I saw {a A} with something'
        ' {T.look}|{a A} {A.move} past me with something in its mouth)," said {M.the}. "It lives in {A.home}."',
        "{H} (crept closer|went there at once). {the A} {A.voice}, but {H} had brought {A.food} and held it out. While"
        " the animal was eating, {H} (took|picked up) {the T}, (which was only a little dirty|which was not even"
        " scratched).",
        "<glad> (<end>|)",
    ),
    "hurt": (
        "<opening> <sky> On the way (to the {M.shop}|home|to school) {H} heard a (faint|strange) sound {spot}.",
        "There lay {a+ A} with a hurt (leg|foot). It {A.voice} (softly|sadly) and (could not stand|trembled all over).",
        '"(Leave it alone|Do not touch it)," said {F}, "(it will bite you|it is wild)." But {H} (shook {H.his}'
        " head|did not listen), wrapped the animal in {H.his} (scarf|jacket) and carried it home. (<hard>|)",
        "{K.the} (washed the wound|made a bandage) and {H} brought {A.food}. For (a week|ten days|two weeks) the"
        " animal slept (in a box by the stove|under the kitchen table). Then it (was well again|had grown strong), and"
        " {H} let it go.",
        "The next (autumn|October) {H} lost {H.his} way in the forest, because (it was already dark|the fog was"
        " thick|{H.he} had gone too far to gather mushrooms). (<tears>|)",
        "Suddenly something {A.voice} (in front of|behind) {H.him}. It was {the A}! It {A.move} ahead, waited, and"
        " {A.move} ahead again, until {H} saw the lights of home.",
        '"(You helped it, and it helped you|Now you are even)," said {K.the}. (<feast>|) (<end>|)',
    ),
    "tool": (
        "<opening> Next door (worked|lived) {a M} who was known for {M.his} (skill|patience|good work).",
        "<sky> (The next day was market day|The mayor was getting married on Sunday|A rich merchant was waiting), and"
        " {M.the} had to deliver {M.new}. But (at noon|just then) {M.his} {M.tool} broke.",
        '"Without {the M.tool} I cannot deliver {M.known}," said {M.the}. "(Who can help me now|What shall I do)?" "I'
        ' will find you a new one," said {H}. <hurry>',
        "First {H.he} asked {N.the}, but {N.the} only (shook {N.his} head|had a broken one too). (<hard>|)",
        "Then {H} remembered that (there was one in the attic|{K.the} kept an old one in the cellar). It was dusty, so"
        " {H.he} cleaned it with (an old brush|a wet cloth) until it looked like new.",
        "Before (sunset|the bells rang) {H} stood in the {M.shop} again. {M.the} worked all night, and in the morning"
        " (everything was ready|the work was done|{M.known} could be delivered).",
        '"I owe you something," said {M.the} and (gave {H.him} {a+ T}|pressed {a+ T} into {H.his} hand). <glad>'
        " (<end>|)",
    ),
    "market": (
        "<opening> <sky> At the market {H} saw {a+ T} and wanted nothing more in the world.",
        '"How much is {the T}?" {H.he} asked. "(Six|Seven|Nine) coins," said the (trader|merchant|old woman), but {H}'
        " had only (one|two|three).",
        "So {H} went to {M.the} and asked for work. For (three days|a whole week|five days) {H.he} (swept the"
        " {M.shop}|carried water and wood|cleaned {the M.tool}), and in return {H.he} got {M.new}.",
        "{H} carried {M.known} to {N.the}, (who had been waiting for weeks|whose eyes lit up at once), and {N.the}"
        " paid (well|with bright coins|without a word).",
        'On the way back {H} met {F}, who was sitting (on a bench|on the church steps|on a fallen tree) and crying. "I'
        ' have lost the money for our (bread|flour|medicine)," said {F}. {H} (thought of {the T}|was silent for a'
        " moment), and then {H.he} gave {F} all {H.his} coins.",
        "(At home|In the evening) {H} told {K.the} (everything|what had happened). {K.the} said nothing, but (the next"
        " morning|on Sunday|a week later) {the T} lay (on {H.his} pillow|beside {H.his} plate). <glad> (<end>|)",
    ),
    "thief": (
        "<opening> {M.the} had a problem: every night (somebody|a thief) stole (something|a little food) from the"
        " {M.shop}.",
        '"(I lock the door each evening|Nobody has a key but me)," said {M.the}, "and in the morning I have no'
        ' {A.food} left." {H} and {F} promised to keep watch.',
        "<sky> They hid (behind a barrel|under the table|behind the door) and waited. {F} (soon fell asleep|was afraid"
        " of the dark), but {H} (kept {H.his} eyes open|pinched {H.his} own arm to stay awake).",
        "At midnight something scratched at the (window|wall), and through a small gap came {a+ A}. It took the"
        ' {A.food} and {A.move} away. "(After it|Quick)!" cried {H}, and they followed it. (<hard>|)',
        "The trail ended at {A.home}. Inside (there were|sat) (three|four|five) hungry young ones, and {the A}"
        " {A.voice}, as if to (beg them|ask them) to be quiet.",
        '"It is no thief," said {F}, "it is a mother." The next day {M.the} (laughed|sighed) and put out a'
        " (bowl|plate) of {A.food} (every evening|by the door). (After that|From then on) nothing was ever stolen"
        " again.",
        "{M.he} also gave the children {M.new}. (<feast>|) (<end>|<friends>|)",
    ),
    "storm": (
        "<opening> On the other side of the river lived {F}, and every (day|Saturday) {H} crossed the (old"
        " bridge|wooden bridge) to visit {F.him}.",
        "(It had rained for a week|After the snow had melted, it rained), and the river rose higher and higher. In the"
        ' night the water tore the bridge away. "(Now nobody can cross|{F} has nothing left to eat over there)," said'
        " {K.the}.",
        '{H} ran to {M.the} and to {N.the}. "(A rope|Two ropes) and (a few|six) planks would be enough," said {M.the},'
        " and {N.the} fetched {N.his} {N.tool}.",
        "But who could bring the rope across? Then {H} saw {a+ A} {spot}. {H.he} tied a thin (thread|string) to its"
        " neck, and (called|whistled), and {F} (stood|waited) on the far bank with {A.food} in {F.his} hand.",
        "{the A} {A.voice}, (climbed over a fallen tree|swam through the cold water) and reached the other side. {F}"
        " pulled the string, and with it came the rope.",
        "(By evening|After two days) a new bridge hung over the water, (narrow|small) but strong. {F} was the first to"
        " walk across, and {K.the} gave {F.him} {food}. (<end>|<friends>|)",
    ),
    "cold": (
        "<opening> <sky> {K.the} was ill and lay in bed, and there was (no more wood for the stove|nothing warm to"
        " eat).",
        '"(Do not worry|Stay in bed)," said {H}, "(I will get help|I will be back before dark)." <hurry> (<hard>|)',
        'In the {M.shop} {M.the} was just putting away {M.his} {M.tool}. "Please, can you help us?" asked {H}. "We'
        ' have no (wood|food|money) left." {M.the} (nodded|thought for a moment) and gave {H.him} {M.new}.',
        "On the way home {H} met {a+ A}, which {A.voice} because it was hungry. {H} had (little|not much), but {H.he}"
        " shared {H.his} last (piece of bread|apple) with it.",
        "Then it grew dark, and {H} could not find the way. {the A} (pulled at {H.his} sleeve|{A.move} ahead) and led"
        " {H.him} (past the well|through the trees) to {H.his} own door.",
        "{F} was already there and had (lit the fire|brought wood). (<feast>|) Three days later {K.the} was well"
        " again, and {the A} (stayed with them|never left {H.his} side). (<end>|<friends>|)",
    ),
    "quarrel": (
        "<opening> {F} lived next door, and the two (did everything together|shared everything). But one day they"
        " found {a+ T} {spot}.",
        '"I saw it first," said {H}. "But I picked it up," (said|cried) {F}. They pulled until {the T} fell (into the'
        " mud|onto the stones|into a puddle), and then they went home without a word.",
        "(<sad>|) {K.the} asked (what was wrong|why {H.he} did not eat), but {H} only looked out of the window.",
        "<sky> The next day {H} was on the way to {M.the} with a message. (<hard>|) At last {H.he} (looked for"
        " shelter|wanted to rest) in (a barn|a hut|an empty stable), and there sat {F}, (cold and tired|with a hurt"
        " foot).",
        'For a long time neither of them spoke. Then {H} gave {F} half of {H.his} (bread|apple|cake). "I am sorry,"'
        ' said {F}. "So am I," said {H}.',
        "Together they took {the T} to {M.the}, who (cleaned it and laughed|made it look like new|shook {M.his} head"
        " and cleaned it). (Now it hangs between their two windows|They gave it to {K.the}|Each of them keeps it for a"
        " week). (<end>|<friends>|)",
    ),
    "drought": (
        "<opening> It had not rained for (two months|forty days), and the (well|fountain) in the (square|yard) was"
        " dry. The (beans|roses|cabbages) hung their heads.",
        '"If it does not rain soon," said {M.the}, "(I shall have to leave|we shall all have to go away)." {N.the} had'
        " already packed {N.his} {N.tool}. (<sad>|)",
        'The next morning {H} saw {a+ A}, which was (not thirsty at all|wet up to its belly). "Where does it drink?"'
        " {H} asked {F}. They followed it (over the hill|through the thorns) and (across the dry stream|past the last"
        " houses). (<hard_sun>|)",
        "At last they came to {A.home}. Nearby the ground was (soft|damp), and between two stones {H} heard a (quiet"
        " murmur|soft gurgle). {the A} {A.voice} and looked at them.",
        "{F} ran back to fetch {M.the}, and {H} began to dig with {H.his} bare hands. When they had moved the"
        " (big|last) stone, clear water (shot|sprang) out of the earth.",
        "Soon there was (water|enough to drink) for everybody, and the (gardens|fields) turned green again. {M.the}"
        " gave {H} and {F} {M.new}, and {the A} got {A.food} every day. (<end>|<friends>|)",
    ),
}

# What a plot needs; a plot not named takes any weather, any animal, any trade.
WEATHER = {"cold": ("snow", "rain", "fog"), "storm": ("rain",), "market": ("sun", "wind"), "quarrel": ("rain", "wind")}
ANIMAL_SIZES = {"lost": "small", "hurt": "small", "thief": "small", "storm": "strong", "cold": "strong"}
TRADE_USES = {"cold": ("food", "warmth")}


def article(noun: str) -> str:
    """The indefinite article for a noun phrase: "an" before a vowel sound, "a" elsewhere."""
    return "an" if noun[0].lower() in "aeiou" and not noun.startswith(("uni", "use", "one")) else "a"


def phrase(cast: Cast, slot: str) -> str:
    """Says the inside of `{...}`: somebody's word, or a noun with its article (`+` adds how it looks)."""
    head, _, name = slot.partition(" ")
    if not name:
        return cast[slot]
    noun = f"{cast[name + '.look']} {cast[name]}" if head.endswith("+") else cast[name]
    return f"{article(noun) if head.startswith('a') else 'the'} {noun}"


def _person(cast: Cast, role: str, name: str, female: bool) -> None:
    he, him, his, child = ("she", "her", "her", "girl") if female else ("he", "him", "his", "boy")
    cast |= {role: name, f"{role}.he": he, f"{role}.him": him, f"{role}.his": his, f"{role}.child": child}


def draw_cast(rng: random.Random, plot: str) -> Cast:
    """Draws who and what a story is about; whatever belongs together comes from one row of a table."""
    cast: Cast = {"place": rng.choice(lexicon.PLACES), "where": rng.choice(lexicon.WHERE)}
    for role in "HF":
        female = rng.random() < 0.5
        names = [name for name in (lexicon.GIRLS if female else lexicon.BOYS) if name != cast.get("H")]
        _person(cast, role, rng.choice(names), female)
    kin = rng.choice(lexicon.KIN)
    cast |= dict(zip(("K", "K.he", "K.him", "K.his"), kin, strict=True)) | {"K.the": f"{cast['H.his']} {kin[0]}"}
    master = rng.choice([row for row in lexicon.TRADES if row[5] in TRADE_USES.get(plot, row[5])])
    other = rng.choice([row for row in lexicon.TRADES if row != master])
    for role, row in zip("MN", (master, other), strict=True):
        _person(cast, role, row[0], row[0] != "fisherman" and rng.random() < 0.5)
        cast |= {f"{role}.{key}": form for key, form in zip(("shop", "tool", "new", "known"), row[1:5], strict=True)}
        cast[f"{role}.the"] = f"the {row[0]}"
    animal = rng.choice([row for row in lexicon.ANIMALS if row[6] == ANIMAL_SIZES.get(plot, row[6])])
    cast |= dict(zip(("A", "A.look", "A.voice", "A.move", "A.food", "A.home"), animal[:6], strict=True))
    cast |= {"T": rng.choice(lexicon.THINGS), "T.look": rng.choice(lexicon.LOOKS), "food": rng.choice(lexicon.FOODS)}
    cast["spot"], cast["spot2"] = rng.sample(lexicon.SPOTS, 2)
    return cast


def tell(rng: random.Random) -> str:
    """Tells one English story."""
    plot = rng.choice(sorted(PLOTS))
    cast = draw_cast(rng, plot)
    sky = rng.choice(WEATHER.get(plot, tuple(sorted(lexicon.SKIES))))
    rules = RULES | {"sky": lexicon.SKIES[sky], "hard": RULES[f"hard_{sky}"]}
    weaver = Weaver(rng, rules, lambda slot: phrase(cast, slot))
    return " ".join(weaver.weave(beat) for beat in PLOTS[plot])
