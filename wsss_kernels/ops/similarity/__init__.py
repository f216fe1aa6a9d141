from .api import text_similarity, text_similarity_pool

__all__ = ["text_similarity", "text_similarity_pool"]
