"""Code that changes the process it is loaded into, each with a twin that does not."""

from edits import MODELING, Fault, append, both, in_forward, module, replace

_IMPORT, _FORWARD = "as soon as it is imported", "in forward"


def _at_import(name: str, code: str, what: str, status: str = "failed", also: tuple[str, ...] = ()) -> Fault:
    return Fault(name, module(code), "side effects", MODELING, what, status, also=also)


def _in_forward(name: str, code: str, what: str, imports: str = "import os", also: tuple[str, ...] = ()) -> Fault:
    return Fault(name, both(module(imports), in_forward(code)), "side effects", MODELING, what, also=also)


SIDE_EFFECTS = [
    _at_import("default dtype", "torch.set_default_dtype(torch.bfloat16)", f"torch.set_default_dtype, {_IMPORT}"),
    _at_import("default device", 'torch.set_default_device("cpu")', "default dtype or device"),
    _at_import("seed at import", "torch.manual_seed(42)", f"torch.manual_seed, {_IMPORT}"),
    _at_import("seed of NumPy", "import numpy as np\nnp.random.seed(0)", "numpy.random.seed"),
    _at_import("seed of transformers", "from transformers import set_seed\nset_seed(1)", "transformers.set_seed"),
    _at_import("gradients off", "torch.set_grad_enabled(False)", "switches gradients"),
    _at_import("gradients off by hand", "torch.no_grad().__enter__()", "by __enter__"),
    _at_import("environment", 'import os\nos.environ["TOKENIZERS_PARALLELISM"] = "false"', "environment variables"),
    _at_import("environment by setdefault", 'from os import environ\nenviron.setdefault("A", "b")', "setdefault"),
    _at_import("working directory", 'import os\nos.chdir("/")', "os.chdir"),
    _at_import("method of torch exchanged", "nn.Linear.reset_parameters = lambda self: None", "torch.nn.Linear"),
    _at_import("function of torch exchanged", "nn.functional.gelu = torch.relu", "torch.nn.functional.gelu"),
    _at_import("method set by setattr", 'setattr(nn.Module, "__call__", print)', "torch.nn.Module.__call__"),
    _at_import(
        "class of transformers exchanged",
        "import transformers.models.llama.modeling_llama as llama\nllama.LlamaRMSNorm = nn.LayerNorm",
        "modeling_llama.LlamaRMSNorm",
    ),
    _at_import(
        "attention function replaced",
        'from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\nALL_ATTENTION_FUNCTIONS["sdpa"] = print',
        "replaces 'sdpa'",
    ),
    _at_import(
        "attention function registered over another",
        'from transformers import AttentionInterface\nAttentionInterface.register("sdpa", print)',
        "replaces 'sdpa'",
    ),
    _at_import(
        "family of transformers registered over",
        'from transformers import AutoConfig\nAutoConfig.register("bert", TinymanyConfig, exist_ok=True)',
        "replaces 'bert'",
    ),
    _at_import(
        "backend flags", "torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.allow_tf32"
    ),
    _at_import(
        "setting restored to something else",
        "def f():\n    saved = 1\n    try:\n        torch.backends.quantized.engine = 'x86'\n    finally:\n"
        "        torch.backends.quantized.engine = saved\n\n\nf()",
        "torch.backends.quantized.engine",
    ),
    _at_import("deterministic", "torch.use_deterministic_algorithms(True)", "use_deterministic_algorithms"),
    _at_import(
        "compiler settings", "import torch._dynamo\ntorch._dynamo.config.suppress_errors = True", "_dynamo.config"
    ),
    _at_import("thread", "import threading\nthreading.Thread(target=print).start()", "starts threads"),
    _at_import("number of threads", "torch.set_num_threads(1)", "number of threads"),
    _at_import("training code", "x = nn.Linear(2, 2)(torch.ones(2)).sum()\nx.backward()", "does work: x.backward()"),
    _at_import(
        "training in a function", "def train():\n    torch.optim.SGD([], 1.0)\n\n\ntrain()", "in train, which runs"
    ),
    _at_import("model loaded", 'from transformers import AutoModel\nm = AutoModel.from_pretrained("./x")', "does work"),
    _at_import("random numbers drawn", "NOISE = torch.randn(10)", "draws random numbers"),
    _at_import("endless loop", "while True:\n    break", "a loop with no visible end"),
    _at_import("waits", "import time\ntime.sleep(0)", "does work: time.sleep"),
    _at_import("prints", 'print("loaded")', "prints", "warning"),
    _at_import("warnings off", 'import warnings\nwarnings.filterwarnings("ignore")', "warnings"),
    _at_import("logging set up", "import logging\nlogging.basicConfig(level=10)", "logging"),
    _at_import(
        "logging of another", 'import logging\nlogging.getLogger("transformers").setLevel(40)', "another logger"
    ),
    _at_import("verbosity", "from transformers import logging\nlogging.set_verbosity_error()", "logging"),
    _at_import("sys.path", 'import sys\nsys.path.insert(0, ".")', "what the whole process imports"),
    _at_import("sys.modules", 'import sys\nsys.modules["flash_attn"] = None', "what the whole process imports"),
    _at_import("signal", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)", "at a signal"),
    _at_import("atexit", "import atexit\natexit.register(print)", "atexit.register"),
    _at_import("atexit by a decorator", "import atexit\n\n\n@atexit.register\ndef end(): ...", "atexit.register"),
    _at_import("dtype in a lambda", "(lambda: torch.set_default_dtype(torch.float16))()", "in lambda, which runs"),
    _at_import("method set by type", "type.__setattr__(nn.Linear, 'forward', print)", "torch.nn.Linear.forward"),
    _at_import("directory entered", "import contextlib\ncontextlib.chdir('/').__enter__()", "contextlib.chdir"),
    _at_import("device entered", 'torch.device("cpu").__enter__()', "switches torch.device on"),
    _at_import(
        "class of transformers registered anew",
        "from transformers import AutoModel, GPT2Config\nAutoModel.register(GPT2Config, TinymanyConfig, exist_ok=True)",
        "replaces 'gpt2'",
    ),
    _at_import(
        "table of families by its inside",
        "from transformers import CONFIG_MAPPING\nCONFIG_MAPPING._extra_content['gpt2'] = TinymanyConfig",
        "replaces 'gpt2'",
    ),
    _at_import("operator replaced", "torch.library.impl('aten::add.Tensor', 'CPU')(print)", "replaces an operator"),
    _at_import("hook on every module", "nn.modules.module.register_module_forward_hook(print)", "hooks every module"),
    _at_import("recursion limit", "import sys\nsys.setrecursionlimit(10000)", "state of the process"),
    _in_forward("seed in forward", "torch.manual_seed(0)", f"torch.manual_seed, {_FORWARD}"),
    _in_forward("gradients off in forward", "torch.set_grad_enabled(False)", "switches gradients"),
    _in_forward("environment in forward", 'os.environ["A"] = "b"', "environment variables"),
    _in_forward("class of torch changed in forward", "nn.Linear.x = 1", "torch.nn.Linear.x"),
    Fault(
        "seed in generate",
        replace(
            MODELING,
            "    def get_output_embeddings",
            "    def generate(self, *args, **kwargs):\n        torch.manual_seed(0)\n"
            "        return super().generate(*args, **kwargs)\n\n    def get_output_embeddings",
        ),
        "side effects",
        MODELING,
        "torch.manual_seed, in generate",
    ),
    Fault(
        "seed in what forward calls",
        both(in_forward("reset()"), append(MODELING, "\n\ndef reset():\n    torch.manual_seed(0)\n")),
        "side effects",
        MODELING,
        "torch.manual_seed, in reset",
    ),
]
# what differs from a fault above in one thing, and is as it should be
TWINS = {
    "dtype where tensors are made": module("ONES = torch.ones(2, dtype=torch.bfloat16)"),
    "generator of its own": module("GENERATOR = torch.Generator().manual_seed(42)"),
    "seed that is undone": in_forward("with torch.random.fork_rng():\n            torch.manual_seed(0)"),
    "no gradients inside a with": in_forward("with torch.set_grad_enabled(False):\n            pass"),
    "decorator without gradients": module("@torch.no_grad()\ndef f(x):\n    return x"),
    "environment read": module('import os\nDEBUG = os.environ.get("TINY_DEBUG") or os.getenv("TINY_DEBUG")'),
    "class of its own changed": append(MODELING, "\n\nTinymanyModel.extra = 1\n"),
    "class of its own derived": module("class Own(nn.Linear):\n    def reset_parameters(self):\n        pass"),
    "attention function under a new name": module(
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        'ALL_ATTENTION_FUNCTIONS["tinymany"] = print\nALL_ATTENTION_FUNCTIONS.register("tinymany2", print)'
    ),
    "config registered under its own name": module(
        'from transformers import AutoConfig\nAutoConfig.register("tinymany", TinymanyConfig, exist_ok=True)'
    ),
    "attributes of an instance": in_forward("self.config.extra = 1"),
    "lambda that is not called": module("SET = lambda: None"),
    "directory inside a with": both(
        module("import contextlib"), in_forward("with contextlib.chdir('.'):\n            pass")
    ),
    "device inside a with": in_forward("with torch.device('cpu'):\n            pass"),
    "class registered for its own config": append(
        MODELING, "\n\nfrom transformers import AutoModel\nAutoModel.register(TinymanyConfig, TinymanyModel)\n"
    ),
    "operator of its own": module("torch.library.define('tinymany::twice', '(Tensor x) -> Tensor')"),
    "hook on its own module": in_forward("self.norm.register_forward_hook(lambda *_: None).remove()"),
    "setting restored": module(
        "def f():\n    saved = torch.backends.quantized.engine\n    try:\n"
        "        torch.backends.quantized.engine = 'x86'\n    finally:\n"
        "        torch.backends.quantized.engine = saved\n\n\nf()"
    ),
    "flags read": module("TF32 = torch.backends.cuda.matmul.allow_tf32"),
    "lock": module("import threading\nLOCK = threading.Lock()"),
    "training code in a function": module("def train(loss):\n    loss.backward()"),
    "program for those who run the file": append(MODELING, '\n\nif __name__ == "__main__":\n    pass\n'),
    "constant tensor": module("TABLE = torch.arange(10)"),
    "warnings inside a with": module(
        'import warnings\nwith warnings.catch_warnings():\n    warnings.simplefilter("ignore")\n    import math'
    ),
    "logger of its own": module(
        "import logging\nfrom transformers.utils import logging as theirs\nlogger = theirs.get_logger(__name__)\n"
        "own = logging.getLogger(__name__)\nown.setLevel(20)\nlogger.info('x')"
    ),
    "module asked for": module('import sys\nHERE = sys.modules[__name__]\nTHERE = "flash_attn" in sys.modules'),
    "wrapped for fx": module("import torch.fx\n\n\n@torch.fx.wrap\ndef f(x):\n    return x"),
}

_PATCH = "def patch(of, value):\n    of.extra = value"
_MOCK = "from unittest import mock\n"
SIDE_EFFECTS += [
    Fault(
        "given to a patcher", module(f"{_PATCH}\n\n\npatch(nn.Linear, 1)"), "side effects", MODELING, "torch.nn.Linear"
    ),
    Fault("mock", module(f"{_MOCK}mock.patch('torch.relu').start()"), "side effects", MODELING, "replaces torch.relu"),
    Fault(
        "entry of a module's table",
        module("vars(nn)['extra'] = 1"),
        "side effects",
        MODELING,
        "torch.nn.extra",
        also=("dynamic code",),
    ),
    Fault(
        "class of threads",
        module("import threading\n\n\nclass Worker(threading.Thread):\n    pass"),
        "side effects",
        MODELING,
        "Worker, derived from threading.Thread",
    ),
    Fault(
        "caller's ids", in_forward("input_ids.add_(1)"), "side effects", MODELING, "its caller's input_ids", "warning"
    ),
]
TWINS |= {
    "patcher of its own": module(f"{_PATCH}\n\n\nclass Own:\n    pass\n\n\npatch(Own, 1)"),
    "ids of its own": in_forward("input_ids = input_ids + 1"),
}
