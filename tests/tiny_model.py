"""A tiny sentence-transformers model, built in place."""

from pathlib import Path

import pytest

WORDS = "wing flow heat shock layer plate cone jet lift drag of the a in on and".split()


def build(folder: Path, *, seed: int = 0, **config) -> Path:
    """Save a BERT of 2 layers and 32 dims with a WordPiece tokenizer of 100 words or so."""
    torch = pytest.importorskip("torch", reason="nestvec[text]")
    transformers = pytest.importorskip("transformers", reason="nestvec[text]")
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    vocab = list(dict.fromkeys([*vocab, *(f"##{c}" for c in letters)]))
    (folder / "vocab.txt").write_text("\n".join(vocab))
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    model = transformers.BertModel(transformers.BertConfig(**(settings | config)))
    model.save_pretrained(folder / "bert")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder / "bert")
    st = pytest.importorskip("sentence_transformers", reason="nestvec[text]")
    whole = st.SentenceTransformer(
        str(folder / "bert"), device="cpu", prompts={"query": "a wing ", "document": ""}
    )
    whole.save(str(folder / "model"))
    return folder / "model"
