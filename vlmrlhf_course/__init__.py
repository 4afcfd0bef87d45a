import logging
import warnings

__version__ = "0.1.0"

# tqdm, which transformers imports, asks notebooks for ipywidgets; no bar of ours needs them.
warnings.filterwarnings("ignore", "IProgress not found")
# bitsandbytes, which peft imports where it is installed, asks for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
