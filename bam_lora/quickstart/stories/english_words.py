"""The words of the English stories: tables with the forms that belong together."""

from __future__ import annotations

from bam_lora.quickstart.stories.weave import table, words

GIRLS = words("Alice; Rose; Emma; Lucy; Clara; Ivy; Nora; Ruth; Daisy; Molly; Grace; Hazel")
BOYS = words("Tom; Jack; Ben; Henry; Oliver; Sam; Peter; Will; Finn; Arthur; George; Hugo")
KIN = table("""
    grandmother; she; her; her
    grandfather; he; him; his
    mother; she; her; her
    father; he; him; his
    aunt; she; her; her
    uncle; he; him; his
""")
PLACES = words("village; town; farmhouse; cottage; mill; small house; stone house; hamlet; old house")
WHERE = words("""
    by the sea; at the foot of the mountains; on the edge of the forest; beside a wide river; on a green hill
    in a quiet valley; near the harbour; behind the dunes; between two lakes; at the end of a long road
""")
# Trade; its shop; its tool; what it makes, new and known; what that is good for.
TRADES = table("""
    baker; bakery; rolling pin; a loaf of bread; the bread; food
    blacksmith; forge; hammer; a lucky horseshoe; the horseshoe; ware
    carpenter; workshop; saw; an oak table; the table; ware
    tailor; shop; needle; a warm coat; the coat; warmth
    shoemaker; shop; knife; a pair of boots; the boots; ware
    gardener; garden; spade; a big pumpkin; the pumpkin; food
    potter; workshop; wheel; a clay jug; the jug; ware
    miller; mill; sieve; a sack of flour; the flour; food
    weaver; cottage; shuttle; a woollen blanket; the blanket; warmth
    clockmaker; shop; file; a brass clock; the clock; ware
    fisherman; boat; net; a basket of fish; the fish; food
    beekeeper; garden; ladder; a jar of honey; the honey; food
    cook; kitchen; ladle; a pot of soup; the soup; food
    farmer; barn; fork; a bag of potatoes; the potatoes; food
""")
# Animal; how it looks; its voice; how it moved; its food; its home; its size.
ANIMALS = table("""
    cat; young; meowed; ran; fish; an empty barrel; small
    crow; black; cawed; flew; corn; a hollow tree; small
    owl; grey; hooted; flew; cheese; the church tower; small
    fox; red; yelped; ran; chicken; a hole under the hedge; small
    hedgehog; fat; sniffed; ran; apples; a heap of leaves; small
    squirrel; quick; chattered; ran; nuts; a hollow tree; small
    goose; white; honked; waddled; grain; the reeds; small
    mouse; tiny; squeaked; ran; cheese; a hole in the wall; small
    badger; shy; growled; ran; berries; a cave under the roots; small
    duck; brown; quacked; waddled; bread; the reeds; small
    hare; thin; whimpered; hopped; cabbage; the tall grass; small
    dog; brown; barked; ran; meat; an old shed; strong
    goat; white; bleated; ran; hay; a broken cart; strong
    donkey; stubborn; brayed; trotted; carrots; the empty stable; strong
    pony; grey; neighed; trotted; oats; the empty stable; strong
    sheep; woolly; bleated; trotted; grass; a fold behind the wall; strong
    calf; spotted; mooed; trotted; hay; a shed by the stream; strong
""")
THINGS = words("""
    kite; lantern; key; ring; basket; hat; scarf; coin; book; flute; drum; doll; bell; map; purse; button; umbrella
    whistle; cup; box; mirror; spoon; toy boat; bracelet
""")
LOOKS = words("red; blue; green; yellow; old; little; pretty; strange; fine; precious; bright; tiny; plain; odd")
SPOTS = words("""
    under the bridge; behind the barn; beside the well; near the church; under the old oak; behind the mill; by the pond
    beside the fence; under a bench in the square; in the orchard; at the edge of the wheat field; on the harbour wall
""")
FOODS = words("""
    pancakes; apple pie; pea soup; roast potatoes; plum cake; bread and butter; bean stew; honey cakes; fried eggs
    baked apples; cheese and bread; potato dumplings
""")
SKIES = {
    "rain": [
        "One autumn (morning|afternoon) dark clouds covered the sky and it began to rain.",
        "It had rained for (two|three|four) days, and the (path|road|yard) was (full of puddles|covered in mud).",
        "That (morning|evening) the rain (drummed on the roof|ran down the windows) and nobody wanted to go out.",
    ],
    "snow": [
        "It was winter, and the snow lay (deep|white and deep) on the (roofs|fields|road).",
        "One cold morning the (river|pond) was frozen and snow fell (without a sound|in thick flakes).",
        "In January the wind turned north and the first snow (came|fell) in the night.",
    ],
    "wind": [
        "One day a strong wind blew (over the hills|from the sea) and shook the (trees|shutters).",
        "It was a wild (day|morning) in March, and the wind tore at the (roofs|washing|branches).",
        "All night the storm had howled, and in the morning (branches|leaves|broken tiles) lay everywhere.",
    ],
    "sun": [
        "One (summer|spring) morning the sun shone (warm|bright) on the (fields|gardens|roofs).",
        "It was the hottest day of July, and there was not a single cloud in the sky.",
        "On a (bright|clear) (Sunday|Monday|Friday) in (May|June) the air smelled of (hay|flowers|grass).",
    ],
    "fog": [
        "One (grey|quiet) morning the fog was so thick that nobody could see the (church|bridge|road).",
        "In (October|November) the fog came up from the (river|valley), and every sound seemed far away.",
        "White mist (hung|lay) over the (fields|water) that day, and the lamps burned even at noon.",
    ],
}
