"""A small story program: writes short, simple children's stories.

Every story is a plot (a list of beats) told about a cast (hero, friend, thing,
places, colours, feelings).  Beats are templates: {X} is a slot of the cast,
[a|b|c] is a free choice, choices may nest.  Plots, casts and choices multiply,
so that two stories are practically never the same, while each one stays
coherent and uses easy words.  All text here was written for this project.
"""
import re

GIRLS = "Lily Anna Mia Rosie Sue Emma Lucy Ella Amy Nora Zoe Molly Sara Ivy Kate Jane".split()
BOYS = "Tom Ben Sam Max Tim Jack Leo Peter Finn Noah Sid Bill Joe Dan Nick Adam".split()
PETS = ("Dot Pip Bobo Daisy Momo Fluffy Spot Coco Benny Nina Hoppy Teddy Ruby Oscar Bella Toby Lulu Sunny "
        "Poppy Rusty Misty Bingo Pepper Ginger Buddy Tiny Honey Milo Duke Penny").split()
# animal: (sound, food, home)
ANIMALS = {
    "cat": ("meow", "fish", "house"), "dog": ("woof", "bones", "little red house"), "rabbit": ("sniff", "carrots", "burrow"),
    "mouse": ("squeak", "cheese", "hole in the wall"), "bear": ("grr", "honey", "cave"), "fox": ("yip", "berries", "den"),
    "duck": ("quack", "bread", "pond"), "bird": ("tweet", "seeds", "nest"), "frog": ("ribbit", "flies", "pond"),
    "pig": ("oink", "apples", "barn"), "cow": ("moo", "grass", "barn"), "horse": ("neigh", "hay", "barn"),
    "owl": ("hoot", "nuts", "old tree"), "squirrel": ("chip", "nuts", "tall tree"), "lion": ("roar", "meat", "cave"),
    "elephant": ("toot", "leaves", "jungle"), "monkey": ("ooh ooh", "bananas", "jungle"), "turtle": ("hum", "leaves", "pond"),
    "hen": ("cluck", "corn", "barn"), "sheep": ("baa", "grass", "field"), "goat": ("maa", "grass", "hill"),
    "puppy": ("yap", "bones", "basket"), "kitten": ("mew", "milk", "basket"), "dragon": ("roar", "soup", "cave"),
    "hedgehog": ("sniff", "apples", "pile of leaves"), "donkey": ("hee haw", "hay", "barn"),
}
THINGS = ("ball kite boat hat book drum bell box key car train doll lamp coat balloon bike stone shell feather blanket "
          "picture ring basket wagon cup spoon bag ribbon button flute robot bucket pencil mirror puzzle rocket computer "
          "clock guitar piano violin trumpet crown sword shield letter map coin camera telephone radio scooter sled truck "
          "airplane helicopter tractor bus teapot kettle plate jar bottle candle lantern pillow chair stool table umbrella "
          "glove scarf sock boot jacket dress necklace bracelet marble block paintbrush crayon notebook diary magnet "
          "telescope whistle rattle horn hammer rope ladder broom net tent backpack suitcase wheel skateboard sailboat "
          "pinwheel").split()
THINGS += ["snow globe", "music box", "teddy bear", "paper plane", "toy boat", "toy duck", "toy car", "jump rope"]
FOODS = ["cake", "apple pie", "cookie", "sandwich", "pancake", "plum pie", "pizza", "honey cake", "carrot cake", "muffin"]
PLANTS = ["flower", "tree", "carrot", "pumpkin", "sunflower", "apple tree", "bean", "rose", "tomato", "berry bush"]
COLORS = "red blue green yellow white brown pink orange purple black silver golden".split()
SIZES = "little small big young tiny".split()
TRAITS = "happy kind brave shy funny clever curious gentle quiet silly friendly cheerful".split()
PLACES = ["the park", "the woods", "the river", "the beach", "the hill", "the lake", "the farm", "the garden", "the town",
          "the market", "the field", "the bridge"]
HOMES = ["near a river", "in a small house", "in the forest", "on a farm", "by the sea", "in a little town", "on a hill",
         "under a big tree", "in a green valley", "next to a lake"]


def art(w):
    return ("an " if w[0].lower() in "aeiou" else "a ") + w


def expand(text, rng, cast):
    pat = re.compile(r"\[([^\[\]]*)\]")
    while (m := pat.search(text)):
        text = text[:m.start()] + rng.choice(m.group(1).split("|")) + text[m.end():]
    return re.sub(r"\{(\w+)\}", lambda m: cast[m.group(1)], text)


def cap(text):
    return re.sub(r'^("?)([a-z])', lambda m: m.group(1) + m.group(2).upper(), text.strip())


def tidy(text):
    text = re.sub(r"\s+", " ", text).strip().replace('?,"', '?"').replace('!,"', '!"')
    speech = r"(?:said|asked|cried|called|thought|(?:he|she|they) (?:said|asked|cried|called|thought))\b"
    text = re.sub(r'([.!?]" )(?!' + speech + r")([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)
    text = re.sub(r"([.!?] |^)([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)
    return re.sub(r'((?:^|[\s])")([a-z])', lambda m: m.group(1) + m.group(2).upper(), text)


def person(rng, used, who=None):
    """A character: name, kind, pronoun forms, full description."""
    r = rng.random()
    if who is None:
        who = "girl" if r < .2 else "boy" if r < .4 else rng.choice(list(ANIMALS))
    while True:
        if rng.random() < 0.15:      # made-up names teach the model to copy
            syl = lambda: rng.choice("bdfgjklmnprstvwz") + rng.choice("aeiou")
            name = (syl() + syl() + rng.choice(["", "", "n", "r", "x", syl()])).capitalize()
            if name not in used:
                break
            continue
        name = rng.choice(GIRLS if who == "girl" else BOYS if who == "boy" else PETS)
        if name not in used:
            break
    used.add(name)
    she = who == "girl" or (who != "boy" and (sum(map(ord, name)) % 2 == 0))
    return dict(name=name, who=who, she=she)


def make_cast(rng, who=None, thing=None, name=None):
    used = set()
    h = person(rng, used, who)
    if name:
        h["name"] = name
        used.add(name)
    f = person(rng, used)
    while f["who"] == h["who"]:
        used.discard(f["name"])
        f = person(rng, used)
    used.add(f["name"])
    size, trait, color = rng.choice(SIZES), rng.choice(TRAITS), rng.choice(COLORS)
    thing = thing or rng.choice(THINGS)
    thing2 = rng.choice([t for t in THINGS if t != thing])
    p1, p2, p3 = rng.sample(PLACES, 3)
    plant, food = rng.choice(PLANTS), rng.choice(FOODS)
    cast = {}
    for k, c in (("", h), ("f", f)):
        she = c["she"]
        cast.update({k + "he": "she" if she else "he", k + "He": "She" if she else "He", k + "his": "her" if she else "his",
                     k + "him": "her" if she else "him", k + "His": "Her" if she else "His",
                     k + "self": "herself" if she else "himself"})
    hs = ANIMALS.get(h["who"], ("hello", "apples", "house"))
    fs = ANIMALS.get(f["who"], ("hello", "apples", "house"))
    adj = rng.choice([size, trait, f"{size} {rng.choice(['brown', 'white', 'gray', 'black'])}" if h["who"] in ANIMALS else trait])
    a, b = rng.sample([x for x in ANIMALS if x not in (h["who"], f["who"])], 2)
    cast.update(H=h["name"], F=f["name"], hwho=h["who"], fwho=f["who"], a_h=art(f"{adj} {h['who']}"),
                a_f=art(f["who"]), af=art(rng.choice(TRAITS + SIZES) + " " + f["who"]), ah=art(h["who"]),
                T=thing, a_T=art(thing), cT=f"{color} {thing}", a_cT=art(f"{color} {thing}"), U=thing2, a_U=art(thing2),
                color=color, c2=rng.choice([c for c in COLORS if c != color]), trait=trait, home=rng.choice(HOMES),
                P=p1, Q=p2, R=p3, plant=plant, a_plant=art(plant), food=food, a_food=art(food),
                hfood=hs[1], ffood=fs[1], hhome=hs[2], fhome=fs[2], hsound=hs[0], fsound=fs[0], A=a, B=b, a_A=art(a), a_B=art(b),
                parent=rng.choice(["mom", "dad", "grandma", "grandpa"]),
                n=rng.choice(["two", "three", "four", "five", "six"]))
    cast["Parent"] = cast["parent"].capitalize()
    return cast


OPEN = ("[Once upon a time there was {a_h} named {H}.|Once upon a time, there was {a_h}. {His} name was {H}.|"
        "There once was {a_h} named {H}.|{H} was {a_h} who lived {home}.|Once there was {a_h} named {H} who lived {home}.|"
        "Once upon a time {a_h} named {H} lived {home}.|Long ago, {a_h} named {H} lived {home}.]")
DAY = "[one day,|one morning,|one sunny day,|one cold day,|one windy day,|one warm afternoon,|one day after lunch,|the next day,]"
SAD = "[{H} was sad.|{H} felt very sad.|{H} sat down and cried.|a tear ran down {his} nose.|{H} did not know what to do.|{H} wanted to cry.]"
GLAD = "[{H} was so happy.|{H} was very happy.|{H} smiled a big smile.|{H} jumped up and down.|{H} clapped and laughed.|{H} felt warm inside.]"
MEET = "[then {H} met {af} named {F}.|just then, {af} named {F} came by.|soon {af} named {F} came along.|a {fwho_} named {F} saw {him}.]"
THANKS = '["Thank you, {F}!" said {H}.|"Thank you so much," said {H}.|{H} gave {F} a big hug.|"You are a good friend," said {H}.|{H} said thank you to {F}.]'
HOMEWARD = "[then {H} went home.|they walked home together.|{H} went home with a smile.|when the sun went down, they all went home.|that night {H} slept very well.|{H} ran home to tell {his} {parent}.]"
FRIENDS = ("[from that day on, {H} and {F} were best friends.|after that, {H} and {F} played together every day.|"
           "{H} and {F} became good friends.|and so {H} had a new friend.|they were friends from then on.]")
WHY = '["Why are you sad?" asked {F}.|"What is wrong?" asked {F}.|"Are you okay?" {F} asked.|{F} asked, "Why are you crying?"]'

# name -> (topic phrases, beats)
PLOTS = {
    "lost_thing": (["{ah} and {a_T}", "{ah} who lost {a_T}", "{a_cT}"], [
        OPEN, "{H} had {a_cT}. [{He} loved it very much.|It was {his} favorite thing.|{He} took it everywhere.|{He} played with it every day.]",
        DAY + " {H} [went to|walked to|ran to] {P} [to play|with the {T}|to see the birds]. [when {he} came home|on the way home|after a while], the {T} was [gone|not there|lost].",
        '["Oh no!" said {H}. "Where is my {T}?"|"My {T}! I lost my {T}!" cried {H}.|"Where did it go?" said {H}.]', "[" + SAD + "|]",
        "{H} looked [under the bed|behind the door|in the tall grass|under a big rock]. [it was not there.|there was no {T}.] {He} looked [by the tree|in a box|near the water|under the table]. [it was not there.|no {T} there.]",
        MEET, WHY, '["I lost my {cT}," said {H}.|"I can not find my {T}," {H} said.]',
        '[{F} thought for a moment.|"I will help you look," said {F}.|"Let us look together," said {F}.|"Do not cry. I can help," said {F}.] [they went back to {P}.|they walked all the way to {P}.]',
        "[there it was, under a bush!|{F} saw something {color} behind a tree. it was the {T}!|{F} looked up. the {T} was in a tree!|the {T} was in the grass. {F} had found it!]",
        GLAD, THANKS, "[" + FRIENDS + "|" + HOMEWARD + "]"]),
    "share": (["sharing", "{ah} who learned to share", "{ah} and {a_T}"], [
        OPEN, "{H} had a new {T}. [it was {color} and shiny.|it was the best {T} in the town.|{his} {parent} gave it to {him}.]",
        DAY + " {F} the {fwho} came to {P}. " + '["Can I play with your {T}?" asked {F}.|"That is a nice {T}," said {F}. "Can I try it?"|"May I have a turn?" asked {F}.]',
        '["No!" said {H}. "It is mine."|"No, it is my {T}," said {H}.|{H} held the {T} close. "No," {he} said.]',
        "{F} [was sad and walked away|looked down and went home|said nothing and sat alone]. {H} played [alone|by {self}]. [but it was not fun.|soon {he} was bored.|it was too quiet.]",
        '[{H} thought about {F}.|"I was not kind," {H} thought.|{H} asked {his} {parent} what to do. "It is good to share," said {Parent}.]',
        '{H} went to find {F}. ["I am sorry," said {H}. "Let us play together."|"I am sorry, {F}. You can have a turn now," {he} said.|"Do you want to play with my {T}?" asked {H}.]',
        '[{F} smiled. "Yes, please!"|"Yes!" said {F}.|{F} was happy again.] [they took turns all day.|first {F} had a turn, and then {H} had a turn.|they played until the sun went down.]',
        "[{H} learned that sharing is more fun.|it was much more fun to play with a friend.|{H} was glad that {he} shared.] [" + FRIENDS + "|]"]),
    "dark": (["being brave", "{ah} who was afraid of the dark", "the dark"], [
        OPEN, "{H} was afraid of the dark. [at night {he} hid under {his} blanket.|{He} did not like to sleep alone.|{He} always wanted a light.]",
        "one night {H} heard a [sound|noise|strange sound]. [tap, tap, tap.|scratch, scratch, scratch.|bump, bump, bump.|whoo, whoo, whoo.]",
        '["Is it a monster?" {he} thought.|"Who is there?" {he} asked.|"Go away!" said {H}.|{H} was very scared.]',
        "{H} called {his} {parent}. {Parent} came with a [small lamp|light|candle]. " + '["Let us go and look," said {Parent}.|"Be brave. I am here with you," said {Parent}.]',
        "[slowly they opened the door.|they looked out of the window.|they walked outside, step by step.] it was not a monster. it was [only ]{af} named {F}.",
        '["I am cold," said {F}.|"I am lost," said {F}.|"I can not find my home," said {F}.|"I am hungry," said {F}.] "[Can I stay here?|Can you help me?|Please let me in.]"',
        "{H} was not scared [any more|now]. {He} gave {F} [a warm blanket|some warm milk|some {ffood}|a soft pillow]. [they looked at the stars together.|{F} fell asleep by the fire.|{F} said thank you.]",
        "[after that night, {H} was not afraid of the dark.|now {H} likes the night.|{H} was brave, and {he} was proud.|the dark is not so bad with a friend.]"]),
    "plant": (["{a_plant}", "{ah} who grew {a_plant}", "{ah} and {a_plant}", "a garden"], [
        OPEN, DAY + " {H} found a [small|tiny|little] seed. " + '["What will it be?" said {H}.|"I will plant it," said {H}.|{He} put it in {his} pocket.]',
        "{H} made a hole in the ground and put the seed in it. [every day {he} gave it water.|{He} gave it water every morning.|{He} watered it and sang to it.]",
        '[{F} the {fwho} came to see. "There is nothing there," said {F}.|"It will not grow," said {F} the {fwho}.|"Why do you water the ground?" asked {F} the {fwho}.] ["Wait and see," said {H}.|"You must wait," said {H}.|{H} did not stop.]',
        "[the rain came. the sun came.|days went by.|{n} days passed.|it rained, and then the sun was warm.] [one morning there was a green leaf!|then a little green leaf came up.|at last something green came out of the ground.]",
        "it grew [and grew|taller and taller|bigger every day]. soon it was a [big|beautiful|huge|lovely] {plant}. " + GLAD,
        '["You were right," said {F}.|{F} could not believe it. "It is so big!" said {F}.|"Wow!" said {F}. "It is so nice."]',
        "[{H} shared it with {F}.|they sat next to it and ate {hfood}.|{H} gave {F} a seed too.|they danced around it.] [good things take time.|{H} was proud of {his} {plant}.|and the next year, there were {n} more.]"]),
    "storm": (["a storm", "{ah} and the rain", "{ah} in the rain"], [
        OPEN, DAY + " {H} was playing [at|near|by] {P}. [the sky became dark.|big gray clouds came.|the wind began to blow.] [drip, drop, drip, drop.|boom! went the thunder.|then it began to rain.]",
        '["I must go home," said {H}.|"Oh no, I am getting wet," said {H}.|{H} ran as fast as {he} could.] [but the rain was too strong.|but {he} could not see the way.|but home was far away.]',
        "[" + SAD + "|{H} was cold and wet.]",
        'a voice said, "[Come in here!|Over here!|Come inside, little one!]" it was {F} the {fwho}. {F} lived in a [{fhome}|small warm house|little house].',
        "{F} gave {H} [a dry towel|a warm blanket|a cup of hot tea|a bowl of hot soup] and [some {ffood}|some bread|a place by the fire]. [they told stories.|they sang songs.|they played a game.]",
        "[soon the rain stopped.|after a while, the sun came out.|at last the storm was over.] [they saw a rainbow in the sky.|a big rainbow was over {P}.|the birds sang again.|everything was clean and bright.]",
        THANKS, "[" + FRIENDS + "|" + HOMEWARD + "]"]),
    "bake": (["{a_food}", "{ah} who made {a_food}", "baking"], [
        OPEN, "[it was the birthday of {F} the {fwho}.|{H} was hungry.|{H} wanted to make something nice for {F} the {fwho}.|{H} loved to cook.] "
        '["I will make {a_food}," said {H}.|so {H} wanted to make {a_food}.]',
        "{He} got [eggs|milk|sugar|butter], [flour|salt|honey|berries] and a big [bowl|pot|spoon]. [but there was no {hfood}.|but then the bowl fell down. crash!|{He} mixed it and mixed it.|but {he} mixed it too fast, and it went all over the floor.]",
        '["What a mess!" said {H}. {He} cleaned it up and started again.|"I will try again," said {H}. this time {he} worked slowly.|"Can you help me?" {he} asked {his} {parent}. {Parent} said yes.]',
        "soon [the kitchen smelled so good.|a sweet smell came out of the window.|it was done, and it was warm.] {F} the {fwho} [came to the door|smelled it from far away|knocked on the door].",
        '["What is that nice smell?" asked {F}.|"It smells so good!" said {F}.|"Is that for me?" asked {F}.] ["It is for you," said {H}.|"Come in and eat with me," said {H}.|"Sit down, there is enough for two," said {H}.]',
        "they ate [it all up|every bit|and ate]. [it was so yummy.|it was sweet and good.|\"This is the best ever,\" said {F}.] " + "[{H} was proud.|" + GLAD + "]"]),
    "stuck": (["{ah} who helped a friend", "helping", "{ah} and {a_f}"], [
        OPEN, DAY + " {H} went for a walk [to|near|by] {P}. [{He} heard a small voice.|{He} heard someone cry.|{H} heard a sound.] " + '"[Help! Help!|Please help me!|Oh, help me!]"',
        "{H} looked [around|up and down|here and there]. {He} saw {af} named {F}. {F} was stuck in [a hole|the mud|a bush|a net|an old box].",
        '["Do not be afraid," said {H}. "I will help you."|"I will get you out," said {H}.|"How did you get there?" asked {H}. "I fell," said {F}.]',
        "{H} pulled [and pulled|very hard|with all {his} might]. [but {F} did not move.|it was too hard.|nothing happened.] " + '["I need more help," said {H}.|{H} had an idea.|so {he} called the {A} and the {B}.]',
        "[the {A} came. the {B} came.|{H} got a long rope.|{H} found a strong stick.] [they all pulled together.|{H} tried again.] [one, two, three!|one, two, three, pull!] [pop! {F} was free.|{F} came out.|at last {F} was out.]",
        '["You saved me!" said {F}.|"Thank you, {H}!" said {F}. "You are so kind."|{F} hugged {H}. "Thank you," {fhe} said.] [{F} gave {H} {a_U}.|{F} gave {H} some {hfood} to say thank you.|they ate some {hfood} together.|]',
        "[" + FRIENDS + "|" + HOMEWARD + "]"]),
    "race": (["a race", "{ah} who wanted to win", "{ah} and {a_f} in a race"], [
        OPEN, "{F} was {af}. {F} was very fast. " + '["I am the fastest of all!" {F} said every day.|"No one can run like me," said {F}.|{F} laughed at {H}. "You are so slow," {fhe} said.]',
        DAY + ' there was a race from {P} to {Q}. ["I will run too," said {H}.|{H} wanted to try.|{H} was slow, but {he} was not afraid.]',
        '["One, two, three, go!" said the {A}.|the {A} said, "Go!"|the {A} rang a bell, and they ran.] {F} ran [like the wind|so fast|far ahead]. {H} [ran step by step|did not stop|went on and on].',
        "[then {F} fell and hurt {fhis} foot.|then {F} got tired and fell asleep under a tree.|but {F} stopped to eat {ffood}.|but {F} took the wrong road.]",
        "[{H} stopped. {He} helped {F} get up. they walked to the end together.|{H} went past {F}. {He} was the first at {Q}!|{H} kept going. at last {he} came to {Q}, and {he} won!]",
        '[everyone cheered.|"Hooray!" said the {A} and the {B}.|all the animals clapped.] {F} said, "[I am sorry that I laughed at you.|You did so well.|You are a good friend.|Next time I will not laugh.]"',
        "[{H} smiled. \"It is okay,\" {he} said.|\"It was fun,\" said {H}.|{H} was very proud.] [they ate {hfood} together.|" + FRIENDS + "|]"]),
    "lost_way": (["{ah} who got lost", "{ah} in the woods", "finding the way home"], [
        OPEN, DAY + " {H} saw [a pretty butterfly|a {color} bird|a {color} flower|a shiny stone] and [followed it|ran after it|went to see it]. [{He} walked and walked.|{He} went far, far away.|{He} did not look where {he} was going.]",
        "soon {H} was [lost|far from home|deep in the woods]. [there were big trees all around.|it was getting dark.|nothing looked the same.] " + '["Where is my home?" said {H}.|"I want my mom," said {H}.|"I am lost!" cried {H}.]',
        "[" + SAD + "|]", MEET, WHY, '"I am lost," said {H}. "I live {home2}."',
        '["I know the way," said {F}. "Come with me."|"Do not worry," said {F}. "I will take you home."|"I can see far from up there," said {F}. {F} climbed a tree. "I see your home!"]',
        "they walked [over the bridge|along the river|up the hill|past {P}] and [past {Q}|over a hill|by the lake|past a red barn]. [at last they were there.|then {H} saw {his} home.|soon {H} could see a light.]",
        '{Parent} [was at the door|ran out|was very happy]. ["There you are!" said {Parent}.|"I was looking for you," said {Parent}.|{Parent} hugged {H} for a long time.] [they gave {F} some {ffood}.|{F} stayed for dinner.|they all ate soup together.]',
        "[{H} did not go so far again.|" + FRIENDS + "|that night {H} was happy to be in {his} own bed.]"]),
    "moon": (["the moon", "{ah} and the moon", "a star", "{ah} and a star"], [
        OPEN, "every night {H} looked at the [{SKY}]. it was [so bright|round and white|so pretty|far away]. " + '["I want to touch the {SKY}," said {H}.|"I want the {SKY}," {H} said.|{H} wanted to play with the {SKY}.]',
        "{H} climbed [a hill|a tall tree|a ladder|on a roof]. [but the {SKY} was too far.|{He} could not reach it.|it was still too high.]",
        "{He} [jumped up high|called out to it|made a long stick]. [but it did not help.|but the {SKY} did not come down.] " + SAD,
        '[then|just then] {F} the {fwho} said, "[Look in the water.|Come with me to the lake.|I can show you the {SKY}.]"',
        "{H} looked in the lake. there was the {SKY}! it was [shining in the water|small and bright|dancing in the water]. " + GLAD,
        '["The {SKY} is for all of us," said {F}.|"You can see it every night," said {F}.|"You do not have to hold it to love it," said {F}.] [they sat by the lake and sang.|they looked at it for a long time.|{H} fell asleep next to {F}.]',
        '["Good night, {SKY}," said {H}.|and the {SKY} smiled down at them.|{H} said good night to the {SKY}.]']),
    "new_friend": (["making friends", "{ah} who had no friends", "{ah} and {a_f}"], [
        OPEN, "{H} was [lonely|alone all day|new in the town]. {He} had no friends. [" + SAD + "|{He} wanted someone to play with.]",
        DAY + ' {H} went to {P}. [{He} saw {a_A}. "Will you play with me?" asked {H}. "I am too busy," said the {A}.|{He} asked {a_A} to play. "Not today," said the {A}.]',
        '[then {he} asked {a_B}. "No," said the {B}. "I am sleepy."|{He} saw {a_B}. "You are too small to play with me," said the {B}.|the {B} ran away too.] ' + "[" + SAD + "|]",
        "then {he} saw {af} [under a tree|on a rock|by the water|on a bench]. the {fwho} was alone too. " + '["Hello. I am {H}," said {H}. "What is your name?"|"Hi," said {H}. "What is your name?"] "My name is {F}," said the {fwho}.',
        '["Do you like {hfood}?" asked {H}. "I love {hfood}!" said {F}.|"Do you want to play with my {T}?" asked {H}. "Oh yes!" said {F}.|"Do you like to sing?" asked {F}. "Yes, I do!" said {H}.]',
        "they [played with the {T}|ate {hfood}|ran and jumped|sang songs|looked at the clouds] all day. [they laughed and laughed.|it was so much fun.|" + GLAD + "]",
        "[now {H} was not lonely any more.|" + FRIENDS + "] [the next day, they met again.|]"]),
    "sorry": (["saying sorry", "telling the truth", "{ah} who broke {a_T}"], [
        OPEN, "{F} the {fwho} had {a_cT}. [it was very old.|{F} loved it very much.|it was very pretty.]",
        DAY + " {H} [wanted to look at it|played with it|picked it up]. [{He} was not careful.|{His} hands were wet.|{He} ran too fast.] [crash! the {T} fell down and broke.|the {T} fell on the floor. it broke.|oops! the {T} broke.]",
        '[{H} was afraid.|"Oh no," thought {H}. "{F} will be angry."|{H} hid the {T} under the bed.]',
        '{F} came home. ["Where is my {T}?" {fhe} asked.|"Did you see my {T}?" asked {F}.] [{H} wanted to run away.|{H} looked at the floor.|{H} said nothing. {His} face was red.]',
        '[then {H} told the truth.|but {H} knew it was best to tell the truth.] ["I broke it," {he} said. "I am so sorry."|"I broke your {T}. I am sorry," said {H}.]',
        '{F} was [sad, but {fhe} was not angry|quiet for a moment|a little sad]. ["Thank you for telling me," said {F}.|"You told the truth. That is good," said {F}.|"It is okay," said {F}. "We can fix it."]',
        "they [fixed it with glue|made a new one together|put it back together]. [it was as good as new.|now it looked even better.|it was not the same, but {F} liked it.] [{H} felt much better.|{H} was glad that {he} told the truth.|" + FRIENDS + "]"]),
    "sick": (["being kind", "{ah} who was sick", "{ah} who took care of a friend"], [
        OPEN, "{His} best friend was {F}, {a_f}. [they played at {P} every day.|every day they walked to {P}.]",
        DAY + " {F} did not come. " + '["Where is {F}?" said {H}.|{H} waited and waited.] {H} went to {F}\'s home. {F} was in bed. "[I am sick|My head hurts|I do not feel well]," said {F}.',
        '["I will take care of you," said {H}.|"Do not worry. I am here," said {H}.|"You must rest," said {H}.]',
        "{H} made [hot soup|warm tea|warm milk] and brought [some {ffood}|a soft blanket|a book|{a_cT}]. [{He} read a story.|{He} sang a soft song.|{He} told funny stories, and {F} laughed.]",
        "[the next day|after {n} days|in the morning] {F} was [much better|well again]. " + '["Thank you, {H}," said {F}. "You are so kind."|"You are the best friend," said {F}.|{F} hugged {H}.]',
        "[they went to {P} and played.|soon they were running at {P} again.|" + GLAD + "] [friends take care of each other.|it is good to have a kind friend.|]"]),
    "big_wish": (["a wish", "{ah} who wanted to fly"], [
        OPEN, "[{H} wanted to fly like a bird.|{H} wanted to fly.] [every day {he} looked up at the sky.|{He} jumped from a rock, but {he} fell down.|{He} tried and tried, but it did not work.]",
        '["You can not fly," said the {A}.|the {A} laughed. "You have no wings," said the {A}.|"That is silly," said the {A}.] [' + SAD + "|]",
        "but {F} the {fwho} did not laugh. " + '["I have an idea," said {F}.|"I will help you," said {F}.]',
        "{F} made [a big kite|a big {color} balloon|wings of leaves|a swing on a tall tree]. {H} held on [tight|with both hands]. [the wind came.|whoosh!|up, up, up they went.]",
        '["I am flying!" said {H}.|"Look at me!" cried {H}. "I am in the sky!"] {He} saw {P} and {Q}. [everything was so small.|{He} saw {his} home far below.|the wind was in {his} face.]',
        "[at last {he} came down on the soft grass.|then {he} came down slowly.] " + GLAD + " " + THANKS,
        "[now {H} knew that friends can make a wish come true.|{H} told everyone about it.|" + FRIENDS + "]"]),
    "cold": (["winter", "{ah} in the snow", "the snow"], [
        OPEN, "it was winter. [snow fell all night.|everything was white.|the lake was ice.] {H} [put on a {color} hat|put on a warm coat|ran out to play|made a snowman].",
        "at {P} {he} saw {af} in the snow. it was {F}. {F} was [cold|very cold and hungry|shaking]. " + '["I have no home," said {F}.|"The wind blew my home away," said {F}.|"I have nothing to eat," said {F}.]',
        '["Take my {color} scarf," said {H}.|{H} gave {F} {his} warm coat.|"You can come home with me," said {H}.] [they walked through the snow.|it was a long way, but they sang.|]',
        "at home [there was a warm fire|{Parent} made hot soup|the fire was warm]. {F} ate [some {ffood}|hot soup|warm bread] and [slept by the fire|smiled|was not cold any more].",
        "[in the morning they made a big snowman.|the next day they played in the snow.|{F} stayed all winter.] [it had a carrot nose.|they threw snowballs and laughed.|they were never cold again.]",
        "[when spring came, they planted {a_plant} together.|" + FRIENDS + "|" + GLAD + "]"]),
    "treasure": (["a treasure", "{ah} who found {a_T}", "{ah} and a magic {T}", "a magic {T}"], [
        OPEN, DAY + " {H} was digging [in the garden|in the sand|near {P}|under a tree]. [{He} found {a_cT}.|there was {a_cT} in the ground!|clink! it was {a_cT}.]",
        '["What is this?" said {H}.|"It is so shiny," said {H}.|{He} cleaned it and looked at it.] [it was magic!|the {T} began to shine.|then the {T} spoke.] "[I can give you one wish|Make one wish|You have one wish]," said the {T}.',
        "{H} thought [and thought|for a long time]. {He} [wanted a big cake|wanted to be a king|wanted a hundred toys|wanted to fly]. then {he} saw {F} the {fwho}. {F} was [sad|hungry|sick|crying].",
        '[' + WHY.replace("{F}", "{H}") + '|"What is wrong, {F}?" asked {H}.] ["I have no food for my family," said {F}.|"My mom is sick," said {F}.|"I lost my home," said {F}.]',
        '[{H} knew what to do.|{H} did not wait.] "I wish for {F} to be happy," {he} said. [the {T} became very bright.|there was a bright light.|poof!]',
        "[soon there was food on the table and a new house.|then everything was well again.|{F} laughed and danced.] [\"Thank you, {H}!\" said {F}.|{F} gave {H} a big hug.|{F} said thank you to {H}.] " + "[the magic was gone, but {H} was happy.|{H} kept the {T} by {his} bed.|a kind heart is the best treasure.]"]),
    "music": (["music", "{ah} who loved to sing", "a song", "{ah} who played the drum"], [
        OPEN, "{H} loved to [sing|play the drum|play the flute|dance]. [{He} did it in the morning. {He} did it at night.|{He} did it all day long.]",
        '["You are too loud!" said the {A}.|"Be quiet," said the {A}. "I want to sleep."|the {A} and the {B} did not like it.] so {H} [stopped|went away|was quiet]. ' + "[" + SAD + "|]",
        "[the days were very quiet.|now it was too quiet.|no one danced. no one laughed.] " + DAY + " [the little {B} could not sleep.|a baby {B} was crying.|the baby {B} cried and cried.]",
        '[nothing helped.|they gave it milk. they gave it a toy. nothing helped.] "[Please, {H}, make your music|{H}, can you help us?|We need {H}]," said the {A}.',
        "{H} [began to sing a soft song|made soft music|started to hum]. [la, la, la.|it was slow and sweet.] the baby [smiled|stopped crying|fell asleep].",
        '["That was so nice," said the {A}. "I am sorry."|"Your music is good," said the {A}.|everyone was happy. "We love your music," they said.]',
        "[now there is music every day, but not at night.|from then on, they all sang together.|" + GLAD + "]"]),
    "boat": (["a boat", "{ah} and a boat", "the sea", "a trip"], [
        OPEN, "{H} wanted to see the [big sea|world|island]. {He} made a boat out of [wood|an old box|a big leaf|a shoe]. " + '["Can I come too?" asked {F} the {fwho}. "Yes!" said {H}.|{F} the {fwho} wanted to come too.]',
        "they took [some {hfood}|some {ffood}|bread and cheese] and [a map|{a_T}|a warm blanket]. [the water was blue.|the wind was good.|splash, splash went the water.] they saw [a big whale|{n} fish|a green island|a {color} bird].",
        "then [there was a hole in the boat|a big wave came|the wind blew hard]. " + '["Oh no! The water is coming in!" said {F}.|"We will fall in the water!" said {F}.|{F} was afraid.]',
        '["Do not be afraid," said {H}.|{H} was brave.|{H} thought fast.] {He} [put the blanket in the hole|held on to {F}|took the {U} and pushed the water out]. [{F} helped too.|they worked together.]',
        "[a kind whale pushed them to the land.|at last they came to the land.|soon they could see {P}.] [they were wet, but they were safe.|they lay down in the warm sand.]",
        '["What a trip!" said {F}.|"That was fun," said {H}. "Let us go again!"|"I am happy to be home," said {F}.] [they laughed.|' + FRIENDS + "|" + HOMEWARD + "]"]),
    "egg": (["an egg", "{ah} who found an egg", "a baby bird"], [
        OPEN, DAY + " {H} found an egg [in the grass|near {P}|under a bush|on the road]. it was [big and white|small and blue|{color}]. " + '["Whose egg is this?" said {H}.|"Where is your mom?" {H} said to the egg.]',
        '{He} asked {a_A}. "[Is this your egg?|Did you lose an egg?]" "No," said the {A}. "[It is not mine.|I do not lay eggs.]"',
        '{He} asked {a_B}. "[It is not my egg|Not mine|I do not know]," said the {B}. [so {H} took the egg home.|so {H} kept the egg warm.]',
        "{H} put the egg in a soft [blanket|hat|basket]. [all night {he} kept it warm.|{He} sat next to it and sang.] in the morning, crack, crack, crack! [a baby bird came out.|out came a tiny bird.|out came a little duck.]",
        '"Mama?" said the baby. {H} laughed. "[I am not your mama, but I will help you.|I am your friend.]" they went to look for the mother.',
        "[they looked by the lake|they looked at {Q}|they walked all day]. then they heard a mother bird. " + '["My baby!" she said.|"There you are, my baby!" she said.] she was so happy.',
        '["Thank you for being so kind," she said to {H}.|she gave {H} a {color} feather.] [every spring they came to see {H}.|' + GLAD + "]"]),
    "too_much": (["being hungry", "{ah} who ate too much", "{a_food}"], [
        OPEN, "{H} [loved to eat|was always hungry]. [most of all {he} loved {hfood}.|{His} favorite food was {hfood}.] " + DAY + " {H} saw a big [pot|basket|bowl|bag] of {hfood} at {P}.",
        'it belonged to {F} the {fwho}. ["You can have one," said {F}.|"Take one, but only one," said {F}.] then {F} went [to the river|to sleep|home for a moment].',
        "{H} ate one. it was so good. [{He} ate one more. and one more.|\"Just one more,\" said {H}.|then {he} ate another, and another.] soon it was all gone.",
        '["Oh, my tummy hurts," said {H}.|{H} was so full that {he} could not walk.|{His} tummy was as round as a ball.] {F} came back. "[Where is all my food?|Who ate it all?]" asked {F}.',
        '"I ate it," said {H}. "I am [so |very |]sorry." [{F} gave {him} some warm tea.|{F} was angry at first.|{F} shook {fhis} head.] ["Now you know," said {F}. "Too much is not good."|"You must ask first," said {F}.]',
        "the next day {H} [picked new {ffood} for {F}|worked all day to help {F}|brought {F} a big basket of {ffood}]. [they ate together, but not too much.|\"Thank you,\" said {F}.|{F} was happy again.]",
        "[{H} learned to wait and to share.|" + FRIENDS + "|]"]),
    "build": (["building a house", "{ah} who built a house", "working together"], [
        OPEN, "{H} had no home. " + '["I will build a house," said {H}.|so {he} wanted to build a house.] {He} used [sticks|straw|leaves|mud]. but the wind blew [hard|and blew], and the house fell down.',
        "[" + SAD + "|]", MEET.replace("saw {him}", "came to look"), '["My house fell down," said {H}.|"The wind took my house," {H} said.] ["You need stones," said {F}.|"Let us build it together," said {F}.|"I will help you make a strong one," said {F}.]',
        "{F} brought [stones|bricks|wood]. the {A} brought [a door|a window|nails]. the {B} brought [a roof|a {color} table|paint]. [they worked all day.|they worked until night.|it was hard work.]",
        "at last there was a [strong|fine|little {color}] house. the wind blew [again|and blew], but the house did not fall. " + GLAD,
        '["Come in, all of you," said {H}.|{H} made soup for all of them.|that night they had a party.] [many hands make work easy.|they sang and danced.|' + FRIENDS + "]"]),
    "school": (["school", "{ah} on the first day of school", "learning to read"], [
        OPEN, "it was the first day of school. {H} was [afraid|shy|not happy]. " + '["I do not know anyone," said {H}.|"I want to stay home," said {H}.|"What if no one likes me?" {he} asked.] {Parent} said, "[It will be fine.|You will have fun.|Be brave.]"',
        "at school {H} sat down next to {F}, {a_f}. {F} [was shy too|said hello|smiled at {him}]. the teacher was [a kind owl|an old turtle|a nice hen]. the teacher [read a story about {a_A}|showed them how to count|showed them how to write].",
        '[{H} could not do it.|it was hard.|{H} made a mistake.] [' + SAD + '|] "[I can show you|Let us do it together|Try again]," said {F}.',
        "they tried again and again. [at last {H} could read {his} name.|then {H} could count to ten.|soon {H} could write a word.] " + '["Well done!" said the teacher.|"Good work!" said the teacher.]',
        "at [lunch|noon] they shared [{hfood}|{ffood}|a sandwich] and played with {a_cT}. [it was a good day.|they laughed a lot.]",
        '"How was school?" asked {Parent}. "[I love school!|It was fun! I have a new friend.|I want to go again tomorrow!]" said {H}.']),
}


def tell(rng, plot=None, who=None, thing=None, name=None):
    """-> (topic phrase, story text)"""
    plot = plot or rng.choice(list(PLOTS))
    cast = make_cast(rng, who, thing, name)
    topics, beats = PLOTS[plot]
    topic = expand(rng.choice(topics), rng, cast)
    sky = "moon" if "moon" in topic else "star" if "star" in topic else rng.choice(["moon", "star"])
    cast["SKY"] = sky
    cast["home2"] = rng.choice(HOMES)
    cast["fwho_"] = cast["fwho"]
    parts = [expand(b.replace("a {fwho_}", "{a_f}"), rng, cast) for b in beats]
    text = " ".join(cap(p) for p in parts if p.strip())
    # "Pip the fox" only on first mention, and "a girl named Lucy" instead of "Lucy the girl"
    tag = f"{cast['F']} the {cast['fwho']}"
    if tag in text:
        head, tail = text.split(tag, 1)
        intro = tag if cast["fwho"] in ANIMALS else f"{cast['a_f']} named {cast['F']}"
        text = head + (intro if cast["F"] not in head else cast["F"]) + \
            tail.replace(tag, cast["F"])
    text = text.replace("{SKY}", sky)
    m = re.search(r"lived ((?:near|in|on|by|under|next)[^.]*)\.", text.split(". ")[0] + ".")
    if plot == "lost_way" and m:
        text = text.replace(f"I live {cast['home2']}", f"I live {m.group(1)}")
    return topic, cast, tidy(text)
