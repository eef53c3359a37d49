"""Restaurants: a generated data set, attributes to a short description.

A grammar of this project's own: no file, no download, the same 10,000 pairs
everywhere. A venue is a name put together from parts and some of nine further
attributes; the text follows one of several plans and wordings, which mostly
follow from the attributes, as a writer's habits would. No prompt of the test or
validation split occurs in another split.

    name: The Copper Heron; kind: tea house; food: Georgian; dish: walnut rolls;
    price: modest
    The Copper Heron is a tea house that serves Georgian food. Guests come for
    the walnut rolls, and prices are modest.
"""

import random

import tensorflow_datasets as tfds

from spec_stream.data.source import pairs_info

SIZES = {"train": 9_000, "validation": 500, "test": 500}
_SEED = 20_240_216

_FIRST = (
  "Copper Velvet Hidden Amber Crooked Silver Painted Quiet Wandering Broken "
  "Golden Salted Northern Humble Gilded Paper Scarlet Frosted Lucky Hollow"
).split()
_SECOND = (
  "Heron Lantern Orchard Kettle Anchor Thimble Sparrow Compass Barrel Walnut "
  "Harbour Violin Saddle Candle Magpie Chimney Feather Pepper Willow Mermaid"
).split()
_OWNERS = (
  "Marta Osman Ines Tobias Priya Lukas Noor Hanna Dario Yuki Greta Samir"
).split()
_KINDS = (
  "tea house|bistro|noodle bar|taverna|diner|wine bar|canteen|grill room|"
  "bakery|supper club"
).split("|")
_DISHES = {
  "Georgian": ("walnut rolls", "cheese bread", "plum stew"),
  "Peruvian": ("lime ceviche", "purple corn pudding", "grilled skewers"),
  "Korean": ("spicy rice cakes", "short ribs", "kimchi pancakes"),
  "Lebanese": ("smoked aubergine", "lamb flatbread", "parsley salad"),
  "Polish": ("potato dumplings", "sour rye soup", "poppy seed cake"),
  "Ethiopian": ("lentil stew", "spiced flatbread", "honey wine"),
  "Basque": ("salt cod", "burnt cheesecake", "pepper omelette"),
  "Vietnamese": ("beef noodle soup", "summer rolls", "crispy pancakes"),
}
_PRICES = ("low", "modest", "fair", "high", "steep")
_SCORES = ("2 stars", "3 stars", "4 stars", "5 stars")
_AREAS = (
  "the old town|the harbour quarter|the university district|the market square|"
  "the northern suburbs|the canal side"
).split("|")
_LANDMARKS = (
  "the clock tower|the botanical garden|the stone bridge|the opera house|"
  "the train station|the city museum|the lighthouse"
).split("|")
_HOURS = ("until ten", "until midnight", "all night", "on weekdays only")
_GUESTS = ("families", "students", "couples", "large groups", "dog owners")
_EXTRAS = (
  "a roof terrace|live piano music|a shaded courtyard|an open kitchen|"
  "board games on every table|a long wine list"
).split("|")


class Restaurants(tfds.core.GeneratorBasedBuilder):
  """Generated restaurant descriptions. Prompt: attributes. Completion: text."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return pairs_info(self)

  def _split_generators(self, dl_manager):
    start, splits = 0, {}
    venues = make_venues(sum(SIZES.values()))
    for split, size in SIZES.items():
      splits[split] = self._generate_examples(venues[start : start + size])
      start += size
    return splits

  def _generate_examples(self, venues: list[dict]):
    for i, venue in enumerate(venues):
      yield i, {"prompt": prompt(venue), "completion": describe(venue)}


def make_venues(count: int) -> list[dict]:
  """`count` venues with distinct prompts, in a fixed order."""
  rng, venues, seen = random.Random(_SEED), [], set()
  while len(venues) < count:
    venue = _venue(rng)
    if prompt(venue) not in seen:
      seen.add(prompt(venue))
      venues.append(venue)
  return venues


def prompt(venue: dict) -> str:
  return "; ".join(f"{key}: {value}" for key, value in venue.items())


def _venue(rng: random.Random) -> dict:
  """Name, kind and food always; of the other seven, three to seven."""
  name = f"{rng.choice(_FIRST)} {rng.choice(_SECOND)}"
  style = rng.randrange(3)
  if style == 0:
    name = f"The {name}"
  elif style == 1:
    name = f"{rng.choice(_OWNERS)}'s {name.split()[1]}"
  food = rng.choice(tuple(_DISHES))
  rest = {
    "dish": rng.choice(_DISHES[food]),
    "price": rng.choice(_PRICES),
    "score": rng.choice(_SCORES),
    "area": rng.choice(_AREAS),
    "near": rng.choice(_LANDMARKS),
    "open": rng.choice(_HOURS),
    "suits": rng.choice(_GUESTS),
    "extra": rng.choice(_EXTRAS),
  }
  kept = set(rng.sample(tuple(rest), rng.randint(3, 7)))
  rest = {key: value for key, value in rest.items() if key in kept}
  return {"name": name, "kind": rng.choice(_KINDS), "food": food, **rest}


def describe(venue: dict) -> str:
  """One to four sentences; the plan follows from the kind of venue."""
  plan = _KINDS.index(venue["kind"]) % 4
  sentences = [_opening(venue, plan), _table(venue, plan), _money(venue, plan)]
  sentences.append(_company(venue, plan))
  if plan == 3:  # these writers put the guests before the bill
    sentences[2:] = sentences[:1:-1]
  return " ".join(s[0].upper() + s[1:] + "." for s in sentences if s)


def _article(noun: str) -> str:
  return ("an " if noun[0] in "aeiou" else "a ") + noun


def _opening(venue: dict, plan: int) -> str:
  name, food = venue["name"], venue["food"]
  kind = _article(venue["kind"])
  place = ""
  if "area" in venue:
    place = f" in {venue['area']}"
  if "near" in venue:
    place += (
      f", close to {venue['near']}" if place else f" near {venue['near']}"
    )
  return (
    f"{name} is {kind}{place} that serves {food} food",
    f"if you like {food} cooking, try {name}, {kind}{place}",
    f"{name}{', ' + kind + place + ','} brings {food} dishes to its guests",
    f"there is {kind}{place} called {name}, which offers {food} food",
  )[plan]


def _table(venue: dict, plan: int) -> str:
  dish, extra = venue.get("dish"), venue.get("extra")
  if dish and extra:
    return (
      f"guests come for the {dish} and enjoy {extra}",
      f"the {dish} should not be missed, and there is {extra}",
      f"it is known for its {dish} and for {extra}",
      f"order the {dish} and make the most of {extra}",
    )[plan]
  if dish:
    return (
      f"guests come for the {dish}",
      f"the {dish} should not be missed",
      f"it is known for its {dish}",
      f"do not leave without trying the {dish}",
    )[plan]
  return f"it has {extra}" if extra else ""


def _money(venue: dict, plan: int) -> str:
  price, score = venue.get("price"), venue.get("score")
  if price and score:
    # A contrast reads as "but": steep prices and few stars go together.
    dear, good = _PRICES.index(price) > 2, _SCORES.index(score) > 1
    joint = "but" if dear == good else "and"
    return (
      f"prices are {price}, {joint} visitors give it {score}",
      f"visitors rate it {score}, {joint} the prices are {price}",
    )[plan % 2]
  if price:
    return f"you can expect {price} prices"
  return f"visitors give it {score}" if score else ""


def _company(venue: dict, plan: int) -> str:
  hours, guests = venue.get("open"), venue.get("suits")
  if hours and guests:
    return (
      f"it is open {hours} and a good choice for {guests}",
      f"open {hours}, it is popular with {guests}",
    )[plan // 2]
  if guests:
    return f"it is a good choice for {guests}"
  return f"the doors are open {hours}" if hours else ""
