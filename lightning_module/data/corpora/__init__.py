"""The texts that a model is trained on, and their documents for validation.

A corpus is a function that returns a `Corpus`: two ways to iterate over documents, a fingerprint
that changes whenever the text may have changed, and a description. Nothing is fetched or read
before the documents are iterated over, so the tokens of a corpus that was prepared earlier are
found without it (see `data/datamodule.py`).

To add a corpus, write such a function in a module beside these, import it here and write a file in
`conf/data/` that names it: the `config.yaml` of every run has the names of this package.
"""

from lightning_module.data.corpora.built_in import sanguo, shakespeare
from lightning_module.data.corpora.corpus import Corpus, DataError, Document
from lightning_module.data.corpora.files import text_files
from lightning_module.data.corpora.hub import hf
from lightning_module.data.corpora.records import records

__all__ = [
    "Corpus",
    "DataError",
    "Document",
    "hf",
    "records",
    "sanguo",
    "shakespeare",
    "text_files",
]
