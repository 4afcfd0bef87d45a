import warnings

__version__ = "0.1.0"

# tqdm, which transformers imports, asks notebooks for ipywidgets; no bar of ours needs them.
warnings.filterwarnings("ignore", "IProgress not found")
