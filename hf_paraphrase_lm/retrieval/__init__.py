"""From documents to what each target reads: embeddings, a searchable index, groups with shared evidence."""

from .document_index import DocumentIndex
from .embedding import LexicalEmbedder, embed_documents, evaluation_mode
from .evidence_dataset import EvidenceDataset
from .fingerprint import corpus_fingerprint, embedder_fingerprint
from .folder_claim import FolderClaim

__all__ = [
    "DocumentIndex",
    "EvidenceDataset",
    "FolderClaim",
    "LexicalEmbedder",
    "corpus_fingerprint",
    "embed_documents",
    "embedder_fingerprint",
    "evaluation_mode",
]
