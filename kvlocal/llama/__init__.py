"""The patched llama.cpp: loading it, its models and contexts, the cells of their caches, sampling, embeddings, and conversations that decode
together.
"""
