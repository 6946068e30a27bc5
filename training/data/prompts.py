"""The prompts that training falls back on when it is given no data: phrases put together by hand-written patterns.

    python -m training.data.prompts > assets/prompts.txt

Each family of subjects has patterns whose slots only take phrases that fit. The list is always the same.
"""

# ruff: noqa: E501
from __future__ import annotations

import random
import re
from collections.abc import Iterator

COUNT = 250  # prompts of each family
SEED = 0

# Phrases that several families share. One line, one table; phrases are separated by "|".
SHARED = """
light: in soft morning light|at golden hour|under an overcast sky|in harsh midday sun|at blue hour|by candlelight|in dappled shade|lit from behind|in the last light of the day|under a full moon|in thin winter sunlight|just after rain|in hazy afternoon light|on a foggy morning|under a stormy sky
framing: a close-up|a wide shot|a long exposure|a black and white photograph|a telephoto shot|a wide-angle view|an old colour photograph|a detailed photograph|a candid snapshot
lens: seen from above|seen from below|shallow depth of field|shot on 35mm film|seen from behind|framed through a window|centred composition|seen at eye level|slightly out of focus background|high contrast|soft focus|symmetrical composition
art: watercolour|oil painting|charcoal drawing|gouache illustration|pencil sketch|woodblock print|linocut|pastel drawing|ink drawing with a light wash|acrylic painting with thick brushstrokes|risograph print|children's book illustration|digital painting|low-poly 3D render|clay animation still|paper collage|embroidery on linen|stained glass|art deco poster without lettering|pixel art|isometric illustration|mosaic of small tiles|fresco on old plaster|tempera on a wooden panel
mood: quiet and melancholy|cheerful|mysterious|serene|dramatic|playful|lonely|warm and cosy|tense|dreamlike|majestic|nostalgic
palette: in muted earth tones|in pale blues and greys|in deep greens and gold|with a limited palette of red and black|in pastel colours|in saturated tropical colours|in sepia|with strong complementary colours|in shades of violet|almost monochrome, with one spot of orange
season: in early spring|in high summer|in late autumn|in the middle of winter|during the rainy season|on the first warm day of the year
weather: in light drizzle|in heavy snow|in a gusty wind|in drifting fog|under a clear sky|as a thunderstorm builds|after the first frost|in a heat haze
"""

FAMILIES = {
    "animals": """
who: a red fox|a barn owl|two grey wolves|a snow leopard|a hedgehog|a herd of wild horses|a brown bear and her cub|a kingfisher|an old elephant|a sea turtle|a chameleon|a pair of swans|a lynx|a field mouse|a humpback whale|a family of meerkats|an octopus|a heron|a stag with wide antlers|a colony of penguins|a peacock|a tree frog|a highland cow|an orangutan|a sleeping tiger|a flock of starlings|a hare|a jellyfish|a pelican|a bumblebee|a raven|an otter
place: at the edge of a birch forest|in tall dry grass|on a mossy stone|beside a frozen lake|in a flooded rice field|on a rocky shore|in a mountain meadow|under old oak trees|in a mangrove swamp|on an ice shelf|in the shade of an acacia|on a river bank|among ferns|in a reed bed|in a snowy clearing|at a water hole|on a sandbank|by a waterfall
deed: looking straight at the viewer|resting|shaking off water|drinking|on the move|listening to something out of view|half hidden|stretching|waiting without a movement|turning its head
= {who} {place}
= {who} {place}, {deed}, {light}
= {framing} of {who} {place}, {light}
= {art} of {who} {place}, {palette}
= wildlife photograph of {who}, {deed}, {season}
= {who} {weather}, {lens}
""",
    "pets": """
who: a tabby cat|a black kitten with white paws|an old golden retriever|a dachshund in a knitted coat|two budgerigars|a fluffy white rabbit|a border collie|a ginger cat|a greyhound|a tortoise|a guinea pig|a sheepdog puppy|a grey parrot|a Siamese cat|a spotted terrier|a hamster|a lazy bulldog|a pony
place: on a windowsill between flowerpots|on a worn leather sofa|in a laundry basket|under a kitchen table|on a wooden porch|in a sunlit hallway|among autumn leaves|on a fishing boat|at the foot of a staircase|in a cardboard box|on a pile of folded blankets|in a bookshop|in the back seat of an old car|on a picnic rug|in a workshop full of wood shavings
deed: asleep|yawning|chasing a ball of wool|staring at a fly|waiting for its owner|with a stick in its mouth|being brushed|peeking over the edge|begging for a piece of cheese|with its tongue out
= {who} {place}
= {who}, {deed}, {place}
= {who} {place}, {light}, {lens}
= {art} of {who} {deed}
= portrait of {who} against a plain {ground} background
ground: teal|mustard yellow|dark grey|cream|dusty pink|navy blue|olive green
""",
    "portraits": """
who: an elderly fisherman|a young woman with freckles|a bearded baker|a girl with braided hair|a retired teacher with round glasses|a mountain guide|a boy with a gap between his teeth|a jazz singer|a nurse after a night shift|a farmer in her sixties|a chess player|a cellist|a shepherd|a grandmother with silver hair|a blacksmith|a ballet dancer|a man with a shaved head|a botanist|a street vendor|a deep-sea diver|a young father with a sleeping baby|a carpenter|a desert nomad|a librarian
wear: in a yellow raincoat|in a thick woollen sweater|wearing a straw hat|in a blue linen shirt|in an embroidered jacket|with a patterned scarf|in a velvet coat|in work clothes|wearing a flower crown|in a crisp white shirt|in a denim jacket|in a dark green dress
look: smiling slightly|laughing|lost in thought|looking away from the camera|with closed eyes|looking tired but content|with a serious expression|squinting into the sun|with a raised eyebrow
= portrait of {who} {wear}
= portrait of {who} {wear}, {look}, {light}
= {framing} of {who}, {look}
= {art}, portrait of {who} {wear}
= studio portrait of {who}, {look}, plain {ground} backdrop
= {who} {wear}, {palette}
ground: grey|brown|pale blue|black|off-white|ochre
""",
    "people": """
who: three children|an old couple|a group of friends|a woman|a man with a dog|two sisters|a family of five|a crowd of commuters|a lone hiker|a marching band|a team of rowers|a street musician|four construction workers|a bride and groom|a potter|a fruit seller|two surgeons|a cyclist|a class of schoolchildren|a tailor|a mechanic|a beekeeper
deed: flying a kite on a windy beach|waiting at a bus stop in the rain|playing cards on a balcony|crossing a narrow footbridge|picking apples|dancing in a village square|repairing a wooden boat|reading in a hammock|cooking over an open fire|watching fireworks from a rooftop|having breakfast in a garden|walking through a field of barley|carrying lanterns along a river|building a snowman|looking at a painting in a museum|shopping at a spice market|rowing across a still lake|pitching a tent below a glacier|planting seedlings|sharing an umbrella|resting on the steps of a fountain|hanging out washing
= {who} {deed}
= {who} {deed}, {light}
= documentary photograph of {who} {deed}, {weather}
= {art} of {who} {deed}
= {who} {deed}, {lens}, {mood}
= {who} {deed} {season}, {palette}
""",
    "landscapes": """
what: a winding river|a range of snow-capped mountains|a terraced hillside|a salt flat|a deep fjord|a lavender field|rolling dunes|a volcanic lake|a canyon of red rock|a peat bog|a chain of small islands|a glacier tongue|a beech forest|a waterfall in three steps|a dry savannah|a vineyard on a slope|a field of poppies|a tidal flat|a bamboo grove|a lonely hill with a single tree|a limestone cliff|a frozen waterfall|a chalk coast|an alpine meadow|a jungle valley
more: with a narrow path leading in|with a small wooden hut|reflected in still water|with birds far away|with grazing sheep|with a stone bridge in the foreground|with low clouds in the valley|without a trace of people|with a ruined tower|with a line of poplars|with a rainbow|with a distant thunderstorm
= {what} {light}
= {what} {more}
= {what} {more}, {season}, {light}
= aerial view of {what}, {palette}
= {art} of {what} {more}
= {what} {weather}, {lens}
= panorama of {what} {season}
""",
    "sea and sky": """
what: a small sailing boat|a lighthouse|a fishing harbour|breaking waves|a coral reef full of fish|a wooden pier|an iceberg|a tall ship under full sail|a rowing boat on a pebble beach|a rock arch|a ferry|a shipwreck covered in weed|a row of beach huts|a cargo ship on the horizon|a paddle steamer|a tugboat|a seaplane on calm water|tide pools|a surfer on a green wave|a buoy with cormorants|a hidden cove
sky: under towering clouds|under the Milky Way|below an aurora|before a red sunrise|as a squall comes in|in dense sea fog|under a sky streaked with pink|in moonlight|at low tide on a windless day|in a winter storm
= {what} {sky}
= {what} {sky}, {mood}
= {framing} of {what} {sky}
= {art} of {what} {sky}
= {what} seen from a cliff, {palette}
= {what} {season}, {light}
""",
    "cities": """
what: a narrow alley hung with laundry|a tram stop|a busy crossing|a rooftop garden|a canal lined with tall brick houses|a night market|an underground station|a row of painted houses on a steep street|a flower stall|a suspension bridge|an empty car park|a corner café with a striped awning|a skyline of glass towers|a square with plane trees|a railway yard|a covered bazaar|a hillside town|a harbour promenade|an old petrol station|a playground between blocks of flats|a staircase street
where: in Lisbon|in Kyoto|in Marrakesh|in a northern port|in Havana|in Mumbai|in an alpine town|in Istanbul|in Mexico City|in Prague|in Hanoi|in a small American town|in Venice|in Lagos|in Seoul|in Edinburgh
= {what} {where}
= {what} {where}, {light}
= {what} {where} {weather}, reflections on the pavement
= {art} of {what} {where}
= {what}, {lens}, {mood}
= {what} at night, lit by neon and street lamps
= {what} {where} {season}, {palette}
""",
    "buildings": """
what: a half-timbered farmhouse|a brutalist library|a Gothic cathedral|a white chapel|a glass greenhouse|a desert fortress of mud brick|a wooden stave church|a modernist villa with a pool|a railway viaduct|a windmill|a Japanese temple|a spiral staircase|an abandoned factory|an opera house|a log cabin|a castle on a crag|a concrete water tower|a domed mosque|a tree house|an observatory|a thatched cottage|a palace courtyard|a covered wooden bridge|a stilt house over water
part: with ivy on the walls|with its lights on|surrounded by cypress trees|behind a rusty gate|reflected in a pond|with scaffolding on one side|half buried in snow|with an open front door|seen across a field|with laundry in the windows|with a tiled roof|and its long shadow
= {what} {part}
= {what} {light}
= architectural photograph of {what}, {lens}
= {art} of {what} {part}
= {what} {part}, {weather}, {lens}
= architect's model of {what}, on a white table
= {what} {season}, {palette}
""",
    "interiors": """
what: a farmhouse kitchen|a small attic bedroom|a library with rolling ladders|a painter's studio|a hotel lobby|a ramen bar with six stools|a child's room|a watchmaker's workshop|a greenhouse with a sofa in it|a train compartment|a loft with tall windows|a bathroom with green tiles|a music room|an apothecary's shop|a ship's cabin|a minimalist living room|a barber shop|a wine cellar|a laboratory full of glassware|a reading nook under the stairs|a school classroom|a conservatory|a cinema with red seats
lamp: lit by a single lamp|in warm evening light from the window|in cool light from a skylight|with closed blinds|by candlelight|in bright morning light|with every lamp on|in the glow of a fireplace
part: with sunlight falling across the floor|with a cat on the armchair|with plants on every shelf|with rain on the windows|with a fire in the stove|with unmade beds|with a half-finished jigsaw on the table|with peeling wallpaper|with copper pans on the wall|with a patterned carpet|with one lamp switched on|with an open suitcase|with dust in the air
= {what} {part}
= {what} {part}, {mood}
= interior of {what}, {palette}
= {art} of {what} {part}
= {what}, {lens}, {lamp}
= doll's house scene of {what} {part}
""",
    "food": """
what: a bowl of ramen with a soft egg|a stack of blueberry pancakes|a loaf of sourdough bread|a plate of grilled sardines|a wedge of blue cheese with figs|a pot of mussels|a slice of lemon tart|dumplings in a bamboo steamer|a tomato salad with basil|a mug of hot chocolate|a paella|a birthday cake with one candle|roasted vegetables|a jar of pickled cucumbers|a basket of strawberries|fresh pasta dusted with flour|a curry with rice and flatbread|an ice cream cone that is melting|a cup of espresso|tacos with lime|a roast chicken|macarons in six colours|a cut pomegranate|oysters on ice
place: on a marble counter|on a rustic wooden table|on a checked tablecloth|on newspaper|on a blue enamel plate|on a picnic blanket|in a cast-iron pan|on a white porcelain dish|beside an open window|on a market stall|on a baking tray|on a slate board
part: with steam rising|garnished with herbs|half eaten|next to a linen napkin|with crumbs all around|drizzled with honey|seen from directly above|with a fork beside it|dusted with sugar|in strong side light
= {what} {place}
= {what} {place}, {part}
= food photograph of {what}, {part}, {light}
= {art} of {what} {place}
= {framing} of {what}, {palette}
= {what} {place}, being served to guests
""",
    "still lifes": """
what: three pears|a brass telescope|an old typewriter|a vase of wilting tulips|a skull and an hourglass|a pair of worn boots|a violin with a broken string|seashells|a stack of letters tied with string|a glass of water|a pocket watch|a ceramic teapot|a heap of autumn leaves|a chess set|a lantern|a pile of hand-dyed wool|perfume bottles|a bicycle bell|paintbrushes in a jar|a globe|keys on a ring|a straw hat|a bowl of eggs|an accordion
place: on a window ledge|on dark velvet|on a weathered table|in front of a cracked wall|on a folded white cloth|on a mirror|on a stone step|among dried flowers|in an open drawer|in a shaft of light|on a shelf with peeling paint|on a sheet of brown paper
= still life of {what} {place}
= {what} {place}, {light}
= {art}, {what} {place}
= {what} and {other} {place}
= {framing} of {what} {place}, {mood}
= product photograph of {what} on a plain {ground} background
other: a lemon cut in half|a burning candle|a blue glass bottle|a moth|a feather|a folded map|a silver spoon|a sprig of rosemary|an empty picture frame|a green apple
ground: white|pale grey|peach|mint green|sand-coloured|deep red
""",
    "plants": """
what: a field of sunflowers|a single red poppy|a bonsai pine|a cherry tree in blossom|a cactus in flower|water lilies|a mossy tree stump|mushrooms on a fallen log|a climbing rose|dandelion seeds|an old olive tree|a fern unrolling|a lotus|a potted lemon tree|a meadow of wild orchids|ivy on a brick wall|a baobab|frost on thistles|a head of red cabbage|autumn maple leaves|a carnivorous plant|lichens on granite|a weeping willow
part: covered in dew|swaying in the wind|with a ladybird|with a butterfly resting on it|after the rain|with bees|with a blurred green background|against a deep blue sky|with spider webs|in a walled garden|beside a stream|in the evening sun
= {what} {part}
= macro photograph of {what} {part}
= botanical illustration of {what}, on cream paper
= {art} of {what} {part}
= {what} {season}, {light}
= {what} {part}, {palette}, {mood}
""",
    "vehicles": """
what: a vintage motorcycle|a red double-decker bus|a street sweeper|a rusty pickup truck|a yellow taxi|a camper van|a racing bicycle|a tractor|a fire engine|a convertible from the fifties|a horse-drawn carriage|a delivery scooter|an old school bus|a milk float|a snow plough|a rickshaw|a vintage racing car|a tandem|a road roller
place: on a coastal road|in a mountain pass|crossing a stone bridge|in a scrapyard|on a salt lake|in front of a seaside hotel|on a muddy track|under cherry trees|in a dim garage|in a desert|in city traffic|beside a barn|on a cobbled street|in a snowstorm
= {what} {place}
= {what} {place}, {light}
= {framing} of {what} {place}
= {art} of {what} {place}
= {what} {place} {weather}, {lens}
= cutaway drawing of {what}, showing how it works
""",
    "sport and work": """
who: a fencer|a rock climber|two sumo wrestlers|a figure skater|a glass blower|a pole vaulter|a firefighter|a ski jumper|a welder|a tea picker|a lacrosse team|a boxer|an archer|a stonemason|a kayaker|a watch repairer|a conductor in front of an orchestra|a stilt walker|a swimmer|a lumberjack|a rodeo rider|a table tennis player|a pizza maker|a tightrope walker|a baseball pitcher
deed: in full concentration|in mid-movement|a moment before the start|in a cloud of dust|with sparks flying|taking a short break|celebrating|training alone|in front of a large crowd|in slow, careful motion|soaked with rain|seen in silhouette
= {who} {deed}
= {who} {deed}, {light}
= sports photograph of {who}, {lens}
= {art} of {who} {deed}
= {who} {deed}, {palette}
= {who} {weather}, {lens}
""",
    "fantasy": """
who: a dragon with feathered wings|a knight in moss-covered armour|a giant made of stone|a witch with a lantern|a mermaid|a tiny dwarf miner|a phoenix|a forest spirit with antlers|a sleeping griffin|an elven archer|a talking badger in a waistcoat|a ghostly rider|a sea serpent|a wizard's apprentice|a walking house on chicken legs|a unicorn|a goblin merchant|a queen of ice|a cloud whale
place: in a hall of roots|on a floating island|in a ruined abbey|at the gate of a dwarf city|in a valley of giant mushrooms|on a bridge over a chasm|in a library that has no ceiling|in a glowing cave|above a sleeping village|in a garden of glass flowers|on the shore of a silver lake|in a snowy pass|in a market of curiosities|beside an ancient standing stone
= {who} {place}
= {who} {place}, {mood}, {light}
= {art} of {who} {place}
= fairy-tale illustration of {who} {place}, {palette}
= epic fantasy painting, {who} {place}
= {who} meets a child {place}
""",
    "science fiction": """
what: an astronaut|a rusting robot|a space station|a city under a dome|a crashed starship|an android gardener|a floating market of airships|a lone rover|a colony of glass domes|a maintenance drone|a giant radio telescope|an alien forest|a train on a magnetic rail|a diver in a brass suit|an orbital elevator|a time traveller's workshop|a sentry robot with moss on its shoulders|a ringed planet rising
place: on a red desert planet|over a frozen moon|in a flooded metropolis|above the clouds of a gas giant|in a field of wheat|in a narrow corridor full of cables|beneath twin suns|in a neon-lit alley|in the shadow of a huge machine|on the sea bed|at the edge of a crater|inside a hollow asteroid
= {what} {place}
= {what} {place}, {light}
= concept art of {what} {place}, {palette}
= retro science-fiction book cover art without lettering, {what} {place}
= {art} of {what} {place}
= {what} {place}, {mood}, {lens}
""",
    "abstract": """
what: overlapping circles|flowing ribbons|a grid of small squares that slowly changes|branching lines like river deltas|torn layers of paper|interlocking triangles|concentric waves|splashes of paint|a spiral of dots|folded planes|marbled ink in water|stacked translucent cubes|tangled threads|soft blobs that merge|a kaleidoscope of petals|cracked glaze|woven stripes|smoke|crystals|topographic contour lines
colour: in blue and copper|in black and white|in red, white and grey|in turquoise and coral|in warm yellows|in deep indigo|in sage green and cream|in all colours of the rainbow|in gold on black|in salmon pink and slate|in muted browns|in acid green and violet
= abstract composition of {what} {colour}
= {what} {colour}, {art}
= seamless pattern of {what} {colour}
= minimalist poster without lettering: {what} {colour}
= geometric abstraction, {what} {colour}, {mood}
= close-up of {texture} {colour}
texture: rough plaster|polished marble|raw silk|rusted iron|wet slate|hammered brass|knitted wool|cracked mud|frosted glass|weathered wood|sandstone|crumpled paper|felt|mother-of-pearl|tree bark|woven rattan
""",
}


def compose() -> list[str]:
    """COUNT prompts of every family, none twice, in an order that mixes the families."""
    rng = random.Random(SEED)
    prompts: list[str] = []
    for text in FAMILIES.values():
        found = _family(text, rng)
        chosen: dict[str, None] = {}
        while len(chosen) < COUNT:
            chosen[next(found)] = None
        prompts += chosen
    rng.shuffle(prompts)
    return prompts


def _family(text: str, rng: random.Random) -> Iterator[str]:
    tables = _tables(SHARED) | _tables(text)
    patterns = [line.removeprefix("= ") for line in text.strip().splitlines() if line.startswith("= ")]
    while True:
        for pattern in patterns:
            yield re.sub(r"\{(\w+)\}", lambda slot: rng.choice(tables[slot[1]]), pattern)


def _tables(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.strip().splitlines() if not line.startswith("=")]
    return {name: phrases.split("|") for name, _, phrases in (line.partition(": ") for line in lines)}


if __name__ == "__main__":
    print("# Made by training/data/prompts.py; see there.")
    print("\n".join(compose()))
