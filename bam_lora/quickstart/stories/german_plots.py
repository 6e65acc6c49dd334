"""The German plots, as templates (`weave.py` says how they are read, `german.py` what stands in `{...}`)."""

from __future__ import annotations

RULES = {
    "opening": [
        "Es war einmal {H.kind} namens {H}, {H.das} {wo P} {where} wohnte.",
        "{wo P} {where} lebte {H} mit {sein:H K dat}.",
        "Vor langer Zeit lebte {wo P} {where} {H.kind} (mit Namen|namens) {H}.",
        "{H} wohnte bei {sein:H K dat} {wo P} {where}.",
        "{where} wohnte einst {H} mit {sein:H K dat} und (zwei Hühnern|fünf Schafen|einem alten Hund|einer faulen"
        " Katze).",
    ],
    "glad": [
        "{H} (lachte|strahlte) und (klatschte in die Hände|sprang vor Freude in die Luft|tanzte durch das Zimmer).",
        "Da freute sich {H} so sehr, dass {H.er} (den ganzen Tag sang|alle Müdigkeit vergaß|nicht einschlafen konnte).",
        "So (stolz|glücklich|froh) war {H} noch nie gewesen.",
    ],
    "sad": [
        "{H} setzte sich auf einen Stein und (weinte|schluchzte leise).",
        "{H} war so traurig, dass {H.er} (nichts essen konnte|lange kein Wort sprach).",
    ],
    "tears": [
        "{H} setzte sich auf einen Baumstumpf und (weinte|schluchzte).",
        "Da liefen {er H dat} die Tränen über die Wangen, und {H.er} wusste nicht, was {H.er} tun sollte.",
    ],
    "feast": [
        "Am Abend saßen alle (am Feuer|um den langen Tisch) und aßen {food}.",
        "Dann machte {sein:H K} {food}, und alle wurden satt.",
        "In dieser Nacht gab es {food}, und sie erzählten, bis (die Kerze|das Feuer|die Lampe) ausging.",
    ],
    "end": [
        "Und immer wenn {H} dort vorbeikam, musste {H.er} lächeln.",
        "Diesen Tag vergaß {H} nie.",
        "Seitdem hat {H} (jedes Versprechen gehalten|jedem geholfen, der darum bat|immer zuerst nachgedacht).",
        "„(Eine gute Tat|Ein gutes Wort) geht nie verloren“, sagte {sein:H K}, und {H} wusste, dass es stimmte.",
        "Und wenn man heute dorthin kommt, (hört man noch diese Geschichte|erzählen die Leute noch von {H}).",
    ],
    "friends": [
        "Von diesem Tag an waren {H} und {F} die besten {Freunde}.",
        "Noch als sie alt waren, (sprachen|lachten) {H} und {F} oft darüber.",
    ],
    "hurry": [
        "{H} zog {sein:H Mantel akk} an und lief (zur Tür hinaus|den Hügel hinunter|auf die Straße).",
        "Ohne ein Wort nahm {H} {sein:H Tasche akk} und rannte los.",
        "Weil keine Zeit zu verlieren war, (lief {H} den ganzen Weg|nahm {H} den kurzen Weg über die Felder).",
    ],
    "hard_Regen": [
        "Der Weg war glatt, und bald waren {sein:H Schuhe} voll Wasser.",
    ],
    "hard_Schnee": [
        "Der Schnee reichte {er H dat} bis zu den Knien, und {sein:H Finger} wurden steif vor Kälte.",
    ],
    "hard_Wind": [
        "Bei jedem Schritt blies {er H dat} der Wind ins Gesicht und zerrte an {sein:H Mantel dat}.",
    ],
    "hard_Sonne": [
        "Die Sonne brannte {er H dat} (auf den Kopf|in den Nacken), und nirgends gab es Schatten.",
    ],
    "hard_Nebel": [
        "{H} sah kaum {sein:H Füße akk}, und zweimal bog {H.er} falsch ab.",
    ],
}

PLOTS: dict[str, tuple[str, ...]] = {
    "verloren": (
        "<opening> {sein:H+ Schatz} war {ein+ T}, {rel T akk} {er H dat} {sein:H K} zum Geburtstag geschenkt hatte.",
        "<sky> {H} hatte {der T akk} mitgenommen, aber (als {H.er} nach Hause kam,|auf dem Heimweg|am Mittag) war"
        " {sein:H Tasche} leer. (<sad>|<tears>)",
        "„Wo hast du {er T akk} zuletzt gesehen?“, fragte {sein:H K}. „Ich (habe {wo S} gespielt|bin {wo S}"
        " hingefallen|habe mich {wo S} ausgeruht)“, antwortete {H}. <hurry> (<hard>|)",
        "{H.er} suchte (lange|überall) {wo S}. Dann ging {H.er} {wohin S2}, fand dort aber nur (nasse Blätter|einen"
        " alten Schuh|eine zerbrochene Tasse|einen rostigen Nagel).",
        "Da kam {der M} vorbei. „(Ich habe {ein A akk} gesehen, {rel A} etwas Glänzendes trug|Vorhin {A.move} {ein A}"
        " mit etwas Glänzendem davon)“, sagte {er M}. „{er A} wohnt {wo A.home}.“",
        "Leise schlich {H} dorthin. {der A} {A.voice}, aber {H} hatte {A.food} mitgebracht. Während das Tier fraß, hob"
        " {H} {der T akk} auf. {er T} (war nur ein wenig schmutzig|hatte nicht einmal einen Kratzer).",
        "<glad> (<end>|)",
    ),
    "verletzt": (
        "<opening> <sky> Auf dem Weg {zu der M dat} hörte {H} {wo S} ein (leises|seltsames) Geräusch.",
        "Dort lag {ein+ A}, {rel A} sich das Bein (verletzt|gebrochen) hatte. {er A} {A.voice} (leise|kläglich) und"
        " konnte nicht aufstehen.",
        "„(Lass {er A akk} liegen|Fass {er A akk} nicht an)“, sagte {F}, „(sonst beißt {er A} dich|{er A} ist wild).“"
        " Aber {H} schüttelte den Kopf, wickelte {der A akk} in {sein:H Schal akk} und trug {er A akk} nach Hause."
        " (<hard>|)",
        "{sein:H K} (machte einen Verband|wusch die Wunde aus), und {H} holte {A.food}. (Eine Woche|Zehn Tage|Zwei"
        " Wochen) lang schlief {der A} in einer Kiste neben dem Ofen. Dann war {er A} gesund, und {H} ließ {er A akk}"
        " frei.",
        "Im nächsten Herbst verirrte sich {H} im Wald, weil (es schon dunkel wurde|dichter Nebel aufzog|{H.er} auf der"
        " Suche nach Pilzen zu weit gegangen war). (<tears>|)",
        "Plötzlich {A.voice} etwas (hinter|vor) {er H dat}. Es war {der A}! {er A} {A.move} voraus, wartete und"
        " {A.move} weiter, bis {H} die Lichter des Dorfes sah.",
        "„Du hast {er A dat} geholfen, und nun hat {er A} dir geholfen“, sagte {sein:H K}. (<feast>|) (<end>|)",
    ),
    "auftrag": (
        "<opening> Einmal bat {der M} {H} um Hilfe: „(Kannst|Willst) du {der M.ware akk} {zu der N dat} bringen? Aber"
        " beeil dich, denn {er N} wartet schon seit (gestern|heute früh) darauf!“",
        "<sky> {H} packte {der M.ware akk} vorsichtig ein und ging los. (<hard>|)",
        "{wo S} blieb {H} stehen. Dort steckte {ein+ A} (im Schlamm|zwischen zwei Brettern) fest und {A.voice}"
        " (laut|verzweifelt). „Wenn ich jetzt helfe, komme ich zu spät“, dachte {H}.",
        "Trotzdem legte {H.er} {der M.ware akk} an den Wegrand und (zog und schob|mühte sich ab), bis {der A} wieder"
        " frei war. Danach (wich {er H dat} das Tier nicht mehr von der Seite|folgte {er H dat} das Tier auf Schritt"
        " und Tritt).",
        "Erst am Abend klopfte {H} an die Tür. „Du kommst spät“, sagte {der N} streng, und {H} erzählte, was geschehen"
        " war.",
        "Da sah {der N} {der A akk} und (rief|lachte): „Das ist ja {mein A}! Seit (zwei|drei|vier) Tagen suche ich {er"
        " A akk} überall.“ Zum Dank schenkte {er N} {er H dat} {ein+ T akk}.",
        "<glad> (Auch {der M} war zufrieden|{sein:H K} freute sich mit). (<end>|)",
    ),
    "markt": (
        "<opening> <sky> Auf dem Markt entdeckte {H} {ein+ T akk} und wünschte sich nichts (so sehr|mehr auf der"
        " Welt).",
        "„Was kostet {der T}?“, fragte {H.er}. „(Sechs|Sieben|Neun) Taler“, sagte (der Händler|die Händlerin), aber"
        " {H} hatte nur (zwei|drei).",
        "Deshalb ging {H} {zu der M dat} und bat um Arbeit. (Drei Tage|Eine ganze Woche|Fünf Tage) lang (fegte {H.er}"
        " {der M.shop akk}|trug {H.er} Wasser und Holz|putzte {H.er} {der M.tool akk}), und dafür bekam {H.er} {ein"
        " M.ware akk}.",
        "{der M.ware akk} brachte {H} {zu der N dat}, {rel N dat} gerade {ein M.ware} fehlte, und {der N} bezahlte"
        " (gut|sofort|mit blanken Münzen).",
        "Auf dem Rückweg traf {H} {F}. {F.er} saß (auf einer Bank|auf der Treppe|unter einem Baum) und weinte. „Ich"
        " habe das Geld für (das Brot|das Mehl|die Medizin) verloren“, sagte {F}. {H} dachte an {der T akk}, aber dann"
        " gab {H.er} {er F dat} alle {sein:H Münzen akk}.",
        "(Zu Hause|Am Abend) erzählte {H} {sein:H K dat} alles. {sein:H K} sagte nichts, aber (am nächsten Morgen|am"
        " Sonntag|eine Woche später) lag {der T} (auf dem Kopfkissen|neben dem Teller). <glad> (<end>|<friends>|)",
    ),
    "dieb": (
        "<opening> {der M} hatte Sorgen: Jede Nacht stahl jemand etwas {aus der M.shop dat}.",
        "„(Ich schließe jeden Abend ab|Niemand außer mir hat einen Schlüssel)“, sagte {er M}, „und am Morgen fehlt"
        " wieder etwas zu essen.“ {H} und {F} versprachen, Wache zu halten.",
        "<sky> Sie versteckten sich (hinter einem Fass|unter dem Tisch|hinter der Tür) und warteten. {F} (schlief bald"
        " ein|fürchtete sich im Dunkeln), aber {H} (machte kein Auge zu|kniff sich in den Arm, um wach zu bleiben).",
        "Um Mitternacht kratzte etwas (am Fenster|an der Wand), und durch eine Lücke kam {ein+ A} herein. {er A} nahm"
        " das Futter und {A.move} davon. „(Schnell|Hinterher)!“, rief {H}, und sie folgten {er A dat}. (<hard>|)",
        "Die Spur endete {wo A.home}. Dort saßen (drei|vier|fünf) hungrige Junge, und {der A} {A.voice}, als ob {er A}"
        " (um Gnade bitten|sie beschützen) wollte.",
        "„Das ist kein Dieb, das ist eine Familie“, sagte {F}. {der M} (lachte|seufzte) und stellte von nun an jeden"
        " Abend {A.food} vor die Tür. (Seitdem|Danach) wurde nie wieder etwas gestohlen.",
        "Den Kindern aber schenkte {der M} {ein M.ware akk}. (<feast>|) (<end>|<friends>|)",
    ),
    "hochwasser": (
        "<opening> Am anderen Ufer des Flusses wohnte {F}, und jeden (Tag|Samstag) ging {H} über die (alte|hölzerne)"
        " Brücke, um {er F akk} zu besuchen.",
        "(Eine Woche lang hatte es geregnet|Als der Schnee schmolz, regnete es auch noch), und das Wasser stieg immer"
        " höher. In der Nacht riss der Fluss die Brücke fort. „Nun kann niemand mehr hinüber“, sagte {sein:H K}.",
        "{H} lief {zu der M dat} und {zu der N dat}. „(Ein Seil|Zwei Seile) und (ein paar|sechs) Bretter würden"
        " genügen“, meinte {der M}, und {der N} holte {sein:N N.tool akk}.",
        "Aber wer sollte das Seil hinüberbringen? Da sah {H} {wo S} {ein+ A akk}. {H.er} band {er A dat} eine"
        " (dünne|lange) Schnur um den Hals, und drüben wartete {F} und lockte mit etwas Futter.",
        "{der A} {A.voice}, (kletterte über einen umgestürzten Baum|schwamm durch das kalte Wasser) und kam ans andere"
        " Ufer. {F} zog an der Schnur, und mit der Schnur kam das Seil.",
        "(Am Abend|Nach zwei Tagen) hing eine neue Brücke über dem Fluss, (schmal|klein), aber fest. Als Erstes ging"
        " {F} hinüber, und {sein:H K} kochte für alle. Es gab {food}. (<end>|<friends>|)",
    ),
    "kälte": (
        "<opening> <sky> {sein:H K} war krank und lag im Bett, und es gab (kein Holz mehr für den Ofen|nichts Warmes"
        " zu essen).",
        "„(Mach dir keine Sorgen|Bleib liegen)“, sagte {H}, „(ich hole Hilfe|vor dem Abend bin ich zurück).“ <hurry>"
        " (<hard>|)",
        "{in der M.shop dat} räumte {der M} gerade {sein:M M.tool akk} weg. „Bitte hilf uns“, sagte {H}, „wir haben"
        " kein (Holz|Essen|Geld) mehr.“ {der M} (nickte|überlegte kurz) und gab {er H dat} {ein M.ware akk}.",
        "Auf dem Heimweg begegnete {H} {ein+ A dat}. {er A} {A.voice}, weil {er A} Hunger hatte. {H} besaß selbst"
        " nicht viel, aber {H.er} teilte {sein:H Apfel akk} mit {er A dat}.",
        "Dann wurde es dunkel, und {H} fand den Weg nicht mehr. {der A} (zog {er H akk} am Ärmel|{A.move} voraus) und"
        " führte {er H akk} (am Brunnen vorbei|zwischen den Bäumen hindurch) bis vor die eigene Tür.",
        "{F} war schon da und hatte (Feuer gemacht|Holz mitgebracht). (<feast>|) Nach drei Tagen war {sein:H K} wieder"
        " gesund, und {der A} blieb (bei ihnen|für immer). (<end>|<friends>|)",
    ),
    "streit": (
        "<opening> Nebenan wohnte {F}, und die beiden (machten alles zusammen|teilten alles). Doch eines Tages fanden"
        " sie {wo S} {ein+ T akk}.",
        "„Ich habe {er T akk} zuerst gesehen!“, sagte {H}. „Aber ich habe {er T akk} aufgehoben!“, rief {F}. Sie"
        " zogen, bis {der T} (in den Schlamm|auf die Steine|in eine Pfütze) fiel. Dann gingen sie ohne ein Wort nach"
        " Hause.",
        "(<sad>|) „Was ist los mit dir?“, fragte {sein:H K}, aber {H} sah nur aus dem Fenster.",
        "<sky> Am nächsten Tag sollte {H} {der M dat} eine Nachricht bringen. (<hard>|) Schließlich wollte {H.er} sich"
        " (in einer Hütte|in einer Scheune|in einem leeren Stall) ausruhen. Dort saß {F}, (müde und"
        " durchgefroren|blass vor Hunger).",
        "Lange sprach keiner von beiden. Dann gab {H} {er F dat} die Hälfte {sein:H Apfel gen}. „Es tut mir leid“,"
        " sagte {F}. „Mir auch“, sagte {H}.",
        "Zusammen brachten sie {der T akk} {zu der M dat}, {rel M akk} die Geschichte (freute|zum Lachen brachte). {er"
        " M} putzte {er T akk}, bis {er T} wie neu war. (Heute hängt {er T} zwischen ihren Fenstern|Sie schenkten {er"
        " T akk} {sein:H K dat}|Nun behält {er T akk} jeder eine Woche). (<end>|<friends>|)",
    ),
    "fest": (
        "<opening> Bald sollte ein großes Fest stattfinden, und wer am besten (sang|tanzte|erzählte), bekam {ein+ T"
        " akk}. {H} übte jeden Abend {wo S}, aber es wollte einfach nicht gelingen.",
        "„Das lernst du nie“, spottete {F} und (ging lachend weiter|drehte sich um). (<sad>|)",
        "{der M} hatte alles gehört. „Komm morgen {in der M.shop akk}“, sagte {er M}. „Auch ich habe früher Fehler"
        " gemacht. Gut wurde es erst beim (fünften|zehnten) Mal.“",
        "Von da an half {H} jeden Nachmittag bei der Arbeit, und dabei übten sie. (Sogar {ein A}|{ein+ A}) kam jedes"
        " Mal ans Fenster und {A.voice}, wenn etwas falsch war.",
        "<sky> Trotzdem kamen am Tag des Festes alle auf den Platz. {H} zitterte, doch dann sah {H.er} {der M akk} in"
        " der ersten Reihe und fing an. Als {H.er} fertig war, (war es ganz still|wagte niemand zu atmen), und dann"
        " klatschten alle.",
        "{H} bekam {der T akk}. „Ich habe mich geirrt“, gab {F} zu, „bringst du es mir bei?“ <glad> (<feast>|)"
        " (<end>|<friends>|)",
    ),
}

# What a plot needs; a plot not named takes any weather, any animal, any trade.
WEATHER = {
    "fest": ("Regen", "Wind", "Nebel"),
    "hochwasser": ("Regen",),
    "kälte": ("Schnee", "Regen", "Nebel"),
    "markt": ("Sonne", "Wind"),
    "streit": ("Regen", "Wind"),
}
ANIMAL_SIZES = {
    "verloren": "klein", "verletzt": "klein", "dieb": "klein", "auftrag": "groß", "hochwasser": "groß", "kälte": "groß",
}  # fmt: skip
TRADE_USES = {"kälte": ("Essen", "Wärme")}
