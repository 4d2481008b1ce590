"""Common words whose letters are counted.

Owns: the list, written for this project.
Must not know: anything else.
"""

WORDS = tuple(
    """
    strawberry banana orange lemon cherry melon apple peach garden flower forest river mountain valley island ocean
    harbor bridge castle window kitchen table chair mirror carpet curtain blanket pillow candle lantern bottle basket
    ladder hammer needle button pocket jacket sweater trousers slipper necklace diamond silver copper marble pepper
    cinnamon butter cheese noodle coffee sugar rabbit squirrel giraffe elephant parrot penguin dolphin turtle spider
    beetle butterfly letter paper pencil eraser school teacher student lesson science history music guitar trumpet
    violin dancer painter doctor farmer sailor soldier engine wheel rocket planet comet thunder rainbow winter summer
    autumn morning evening minute calendar holiday festival market baker butcher tailor miller hunter fisher singer
    writer reader leader speaker driver runner swimmer climber winner partner brother sister mother father daughter
    cousin uncle neighbor friend stranger visitor guest captain pilot porter waiter manager builder plumber carpenter
    barrel bucket kettle saucer spoon napkin recipe flavor vinegar mustard ginger garlic onion carrot cabbage lettuce
    spinach tomato potato pumpkin cucumber radish celery parsley almond walnut peanut raisin cookie biscuit pancake
    pastry chocolate caramel honey vanilla yogurt omelet sausage salmon lobster oyster shrimp chicken turkey pigeon
    sparrow swallow eagle falcon raven feather monkey gorilla leopard panther cheetah buffalo camel donkey horse
    hamster hedgehog badger weasel otter beaver lizard cricket mosquito hornet ladybug tulip orchid daisy violet lily
    maple willow cedar poplar bamboo cactus meadow prairie desert canyon glacier volcano cavern waterfall lagoon
    peninsula continent country village city capital station airport railway tunnel avenue corner crossing signal
    traffic bicycle scooter tractor trailer wagon carriage vessel anchor rudder paddle canoe compass telescope
    microscope camera battery cable socket switch antenna computer keyboard monitor printer scanner folder document
    envelope package parcel ribbon sticker crayon palette canvas sculpture museum gallery theater curfew concert
    orchestra piano organ flute clarinet drummer rhythm melody chorus ballad poem novel chapter paragraph sentence
    grammar alphabet number fraction triangle rectangle circle pyramid cylinder angle distance measure balance weight
    pressure gravity energy current voltage magnet crystal mineral granite pebble gravel cement timber lumber plank
    shovel hatchet chisel pliers wrench screw hinge handle lever pulley spring gear piston pump valve nozzle filter
    furnace chimney cellar attic balcony terrace fence gate gutter shutter lattice column pillar arch tower temple
    palace fortress cottage cabin hotel hospital pharmacy library office factory workshop studio stadium arena
    """.split()  # noqa: SIM905 - one word per line would fill ten pages
)
