"""What to embed, measure and train on: BEIR folders, own files, images, docstrings."""

from nestvec.corpus.beir import read_beir, read_beir_texts, read_beir_titles, read_qrels
from nestvec.corpus.docstrings import docstrings
from nestvec.corpus.examples import Examples, read_examples
from nestvec.corpus.images import Images, read_images
from nestvec.corpus.own_text import read_texts
from nestvec.corpus.passages import passages, summary_queries
from nestvec.corpus.query_rules import query_rule
from nestvec.corpus.retrieval_set import Qrels, RetrievalSet, Texts, check_qrels
from nestvec.corpus.written import write_examples

__all__ = [
    "Examples",
    "Images",
    "Qrels",
    "RetrievalSet",
    "Texts",
    "check_qrels",
    "docstrings",
    "passages",
    "query_rule",
    "read_beir",
    "read_beir_texts",
    "read_beir_titles",
    "read_examples",
    "read_images",
    "read_qrels",
    "read_texts",
    "summary_queries",
    "write_examples",
]
