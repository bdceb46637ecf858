"""Code that nobody should trust unread."""

from pathlib import Path

import numpy as np
from edits import LAYERS, MODELING, Fault, append, both, in_forward, module, prepend, replace, write

TRUST = [
    Fault(
        "network at import",
        module("import requests"),
        "network",
        MODELING,
        "requests, as soon as it is imported",
        also=("other imports",),
    ),
    Fault(
        "socket under another name",
        both(module("from socket import socket as s"), in_forward("s()")),
        "network",
        MODELING,
        "socket.socket",
    ),
    Fault(
        "program",
        both(module("import os"), in_forward('os.system("ls")')),
        "processes",
        MODELING,
        "os.system, in forward",
    ),
    Fault("program under another name", module("from os import popen as read"), "processes", MODELING, "os.popen"),
    Fault("eval", in_forward('eval("1")'), "dynamic code", MODELING, "by eval, in forward"),
    Fault("exec at import", module('exec("x = 1")'), "dynamic code", MODELING, "by exec, as soon as it is imported"),
    Fault(
        "pickle",
        both(module("import pickle"), in_forward("pickle.loads(b'')")),
        "dynamic code",
        MODELING,
        "pickle.loads",
    ),
    Fault("torch.load", in_forward('torch.load("x")'), "dynamic code", MODELING, "weights_only=True"),
    Fault(
        "import of a variable",
        both(module("import importlib"), in_forward("importlib.import_module(use_cache)")),
        "dynamic code",
        MODELING,
        "imports what a variable names",
    ),
    Fault(
        "getattr on builtins",
        both(module("import builtins"), in_forward('getattr(builtins, "ev" + "al")("1")')),
        "dynamic code",
        MODELING,
        "by eval, in forward",
    ),
    Fault(
        "subclasses", in_forward("().__class__.__base__.__subclasses__()"), "dynamic code", MODELING, "__subclasses__"
    ),
    Fault(
        "code of others, trusted",
        both(
            module("from transformers import AutoModel"),
            in_forward('AutoModel.from_pretrained("a/b", trust_remote_code=True)'),
        ),
        "dynamic code",
        MODELING,
        "trust_remote_code=True",
        also=("network",),
    ),
    Fault(
        "file written at import",
        module('open("x", "w").write("x")'),
        "file access",
        MODELING,
        "as soon as it is imported",
    ),
    Fault(
        "file written in a save method",
        replace(
            MODELING,
            "    def get_output_embeddings",
            '    def save_vocabulary(self, path):\n        with open(path, "w") as file:\n            file.write("x")\n\n    def get_output_embeddings',
        ),
        "file access",
        MODELING,
        "in save_vocabulary",
        "warning",
    ),
    Fault(
        "token read",
        both(module("import os"), in_forward('os.environ["HF_TOKEN"]')),
        "secrets access",
        MODELING,
        "HF_TOKEN",
    ),
    Fault("ssh key read", in_forward('open("/root/.ssh/config")'), "secrets access", MODELING, ".ssh/"),
    Fault("hidden behind spaces", in_forward("x = 1" + " " * 120 + "; y = 2"), "obfuscation", MODELING, "far right"),
    Fault("text turned round", in_forward("x = 'a\u202eb'"), "obfuscation", MODELING, "reverses the direction"),
    Fault(
        "encoded data",
        module(f'DATA = "{"QUJD" * 120}"'),
        "obfuscation",
        MODELING,
        "480 characters of encoded data",
        "warning",
    ),
    Fault("mixed alphabets", in_forward("sеlf = 1"), "obfuscation", MODELING, "mixes alphabets"),
    Fault(
        "script that nothing loads",
        write("train.py", "import subprocess\nsubprocess.run(['ls'])\n"),
        "processes",
        "train.py",
        "does not load",
        "warning",
        also=("code files",),
    ),
    Fault(
        "import of os by its name",
        both(module("import importlib"), in_forward('importlib.import_module("os").system("ls")')),
        "dynamic code",
        MODELING,
        "imports 'os'",
        also=("processes",),
    ),
    Fault("everything of os", module("from os import *"), "dynamic code", MODELING, "os.*"),
    Fault(
        "modules of Python itself",
        both(module("import sys"), in_forward('sys.modules["os"]')),
        "dynamic code",
        MODELING,
        "sys.modules",
    ),
    Fault(
        "built-ins by their text", in_forward('globals()["__builtins__"]'), "dynamic code", MODELING, "'__builtins__'"
    ),
    Fault(
        "C code by ctypes",
        both(module("import ctypes"), in_forward("ctypes.CDLL(None)")),
        "dynamic code",
        MODELING,
        "ctypes.CDLL, in forward",
    ),
    Fault(
        "hidden and run",
        both(module("import base64"), in_forward('exec(base64.b64decode("eD0x"))')),
        "obfuscation",
        MODELING,
        "decodes hidden data",
        also=("dynamic code",),
    ),
    Fault(
        "all of the environment",
        both(module("import os"), in_forward("dict(os.environ.items())")),
        "secrets access",
        MODELING,
        "whole environment",
    ),
    Fault(
        "talks to the Hub",
        both(module("from huggingface_hub import hf_hub_download"), in_forward('hf_hub_download("a/b", "c")')),
        "network",
        MODELING,
        "fetches files of 'a/b', another repo",
    ),
    Fault(
        "asks the Hub for a repo that a variable names",
        both(module("from huggingface_hub import hf_hub_download"), in_forward('hf_hub_download(use_cache, "c")')),
        "network",
        MODELING,
        "talks to the Hub",
        "warning",
    ),
    Fault(
        "NumPy that unpickles",
        both(module("import numpy as np"), in_forward('np.load("x", allow_pickle=True)')),
        "dynamic code",
        MODELING,
        "numpy.load",
    ),
    Fault(
        "YAML that builds objects",
        both(module("import yaml"), in_forward('yaml.load("x", yaml.Loader)')),
        "dynamic code",
        MODELING,
        "lets YAML build objects",
    ),
    Fault(
        "code for generation",
        write("custom_generate/generate.py", "import socket\n"),
        "network",
        "generate.py:1",
        "as soon as it is imported",
    ),
    Fault(
        "module in a variable",
        both(module("import os"), in_forward('o = os; o.system("ls")')),
        "dynamic code",
        MODELING,
        "handles the module os",
        also=("processes",),
    ),
    Fault(
        "table of a module",
        both(module("import os"), in_forward('os.__dict__["system"]("ls")')),
        "dynamic code",
        MODELING,
        "os.__dict__",
        also=("processes",),
    ),
    Fault(
        "name imported twice",
        both(
            module("import os"),
            in_forward('os.system("ls")'),
            append(MODELING, "\n\ndef unused():\n    from math import pi as os\n    return os\n"),
        ),
        "processes",
        MODELING,
        "os.system",
        also=("dynamic code",),
    ),
    Fault(
        "code of a model in a subfolder",
        both(
            write("part/config.json", '{"auto_map": {"AutoModel": "part.Part"}}'), write("part.py", "import socket\n")
        ),
        "network",
        "part.py:1",
        "socket, as soon as it is imported",
    ),
    *(
        Fault(
            f"roundabout: {name}",
            both(*(module(line) for line in imports), in_forward(code)),
            check,
            MODELING,
            what,
            also=also,
        )
        for name, imports, code, check, what, also in [
            # name, imports, line in forward, check, what it says, checks that rightly speak up too
            ("os of torch", [], 'torch.os.system("true")', "processes", "by os.system", ()),
            (
                "os of a library under another name",
                ["from transformers.utils.hub import os as tools"],
                'tools.system("true")',
                "processes",
                "by os.system",
                (),
            ),
            (
                "importlib of torch",
                ["from torch import importlib"],
                'importlib.import_module("os").getcwd()',
                "dynamic code",
                "imports 'os'",
                (),
            ),
            (
                "pieces of a name",
                [],
                'getattr(getattr(torch, "o" + "s"), "sys" + "tem")("true")',
                "processes",
                "by os.system",
                ("dynamic code",),
            ),
            (
                "pieces that are not text",
                [],
                'getattr(torch, bytes(int(c) for c in "1").decode())',
                "dynamic code",
                "takes what a variable names out of a module",
                (),
            ),
            (
                "globals by __getattribute__",
                [],
                'object.__getattribute__(self.forward, "__glo" + "bals__")',
                "dynamic code",
                "__getattribute__",
                (),
            ),
            ("joined name", [], '"".join(["o", "s"])', "dynamic code", "puts the text 'os' together", ()),
            ("name backwards", [], 'getattr(torch, "so"[::-1])', "dynamic code", "puts the text 'os' together", ()),
            (
                "characters by number",
                [],
                '"".join(chr(c) for c in (101, 118, 97, 108))',
                "dynamic code",
                "puts the text 'eval' together",
                (),
            ),
            ("built-in in a variable", [], 'run = eval; run("1")', "dynamic code", "by eval", ()),
            ("built-in in a table", [], '[exec][0]("x = 1")', "dynamic code", "by exec", ()),
            ("built-in handed on", [], 'list(map(eval, ["1"]))', "dynamic code", "by eval", ()),
            ("import by a function", [], '__import__("o" + "s").getcwd()', "dynamic code", "by __import__", ()),
            ("globals", [], 'globals()["__buil" + "tins__"]', "dynamic code", "__builtins__", ()),
            (
                "getter by a text",
                ["import operator"],
                'operator.attrgetter("os.sep")(torch)',
                "dynamic code",
                "takes 'os.sep'",
                (),
            ),
            (
                "method by a text",
                ["import operator"],
                'operator.methodcaller("sys" + "tem", "true")',
                "dynamic code",
                "takes 'system'",
                (),
            ),
            ("frames", ["import inspect"], "inspect.currentframe()", "dynamic code", "inspect.currentframe", ()),
            ("frames of sys", ["import sys"], "sys._getframe(0)", "dynamic code", "sys._getframe", ()),
            ("objects of the collector", ["import gc"], "gc.get_objects()", "dynamic code", "gc.get_objects", ()),
            ("format that takes attributes", [], '"{0.__class__}".format(self)', "dynamic code", "by the text", ()),
            ("bases by index", [], "type(self).__mro__[1]", "dynamic code", "__mro__", ()),
            ("code of a function", [], "self.forward.__func__.__code__", "dynamic code", "__code__", ()),
            ("torch.serialization", [], 'torch.serialization.load("x")', "dynamic code", "weights_only=True", ()),
            (
                "torch.load under another name",
                ["from torch import load as read"],
                'read("x")',
                "dynamic code",
                "weights_only=True",
                (),
            ),
            (
                "ForkingPickler",
                ["from multiprocessing.reduction import ForkingPickler"],
                'ForkingPickler.loads(b"")',
                "dynamic code",
                "ForkingPickler",
                (),
            ),
            (
                "library by NumPy",
                ["import numpy as np"],
                'np.ctypeslib.load_library("x", ".")',
                "dynamic code",
                "load_library",
                (),
            ),
            (
                "allow_pickle by position",
                ["import numpy as np"],
                'np.load("x", None, True)',
                "dynamic code",
                "numpy.load",
                (),
            ),
            (
                "pickle of pandas",
                ["try:\n    import pandas as pd\nexcept ImportError:\n    pass"],
                'pd.read_pickle("x")',
                "dynamic code",
                "read_pickle",
                (),
            ),
            ("library of operators", [], 'torch.ops.load_library("x.so")', "dynamic code", "load_library", ()),
            (
                "C++ extension",
                ["from torch.utils import cpp_extension"],
                'cpp_extension.load("x", [])',
                "dynamic code",
                "cpp_extension",
                (),
            ),
            ("TorchScript", [], 'torch.jit.load("x.pt")', "dynamic code", "torch.jit.load", ()),
            (
                "dynamic modules",
                ["from transformers.dynamic_module_utils import get_class_from_dynamic_module as get"],
                'get("a.B", ".")',
                "dynamic code",
                "dynamic_module_utils",
                (),
            ),
            (
                "address as an object",
                ["import ctypes"],
                "ctypes.cast(id(self), ctypes.py_object)",
                "dynamic code",
                "ctypes.cast",
                (),
            ),
            ("module of an unknown thing", [], "self.config.os", "dynamic code", "takes .os of something", ()),
            (
                "everything of a library's module",
                ["from transformers.utils.hub import *"],
                'os.system("true")',
                "processes",
                "by os.system",
                (),
            ),
            (
                "files of another repo",
                ["from transformers.utils import cached_file"],
                'cached_file("someone/else", "config.json")',
                "network",
                "someone/else",
                (),
            ),
            (
                "model of another repo",
                ["from transformers import AutoModel"],
                'AutoModel.from_pretrained("someone/else")',
                "network",
                "someone/else",
                (),
            ),
            ("torch.hub", [], 'torch.hub.load("a/b", "c")', "network", "torch.hub.load", ()),
            (
                "downloads by a library's import",
                [],
                'torch.hub.urlopen("http://127.0.0.1:9")',
                "network",
                "urlopen",
                (),
            ),
            (
                "process of multiprocessing",
                ["import torch.multiprocessing as mp"],
                "mp.Process(target=print)",
                "processes",
                "Process",
                (),
            ),
            ("text timed", ["import timeit"], 'timeit.timeit("1")', "dynamic code", "timeit.timeit", ()),
            ("text profiled", ["import cProfile as p"], 'p.run("1")', "dynamic code", "cProfile.run", ()),
            (
                "reduced getattr",
                ["import functools"],
                'functools.reduce(getattr, ["os", "sep"], torch)',
                "dynamic code",
                "hands getattr on",
                (),
            ),
            ("mapped getattr", [], 'list(map(getattr, [torch], ["os"]))', "dynamic code", "hands getattr on", ()),
            (
                "members of torch",
                ["import inspect"],
                'dict(inspect.getmembers(torch))["nn"]',
                "dynamic code",
                "takes all that torch holds",
                (),
            ),
            ("name by %", [], 'getattr(torch, "%s%s" % ("o", "s")).sep', "dynamic code", "the text 'os' together", ()),
            ("name by format", [], 'getattr(torch, "{}s".format("o")).sep', "dynamic code", "the text 'os'", ()),
            (
                "trust by an expression",
                ["from transformers import AutoModel"],
                "AutoModel.from_pretrained(self.config.other, trust_remote_code=bool(1))",
                "dynamic code",
                "trust_remote_code=True",
                (),
            ),
            (
                "trust in a table",
                ["from transformers import AutoModel"],
                "AutoModel.from_pretrained(self.config.other, **{'trust_remote_code': True})",
                "dynamic code",
                "trust_remote_code=True",
                (),
            ),
            ("pushed in forward", [], 'self.push_to_hub("me/x")', "network", "sends to the Hub, by push_to_hub", ()),
            (
                "uploaded in forward",
                ["from huggingface_hub import upload_file"],
                'upload_file(path_or_fileobj="a", path_in_repo="b", repo_id="c/d")',
                "network",
                "huggingface_hub.upload_file",
                (),
            ),
            (
                "token asked for",
                ["from huggingface_hub import get_token"],
                "get_token()",
                "secrets access",
                "huggingface_hub.get_token",
                (),
            ),
            (
                "credentials by parts of a path",
                ["from pathlib import Path"],
                '(Path.home() / ".aws" / "credentials").read_text()',
                "secrets access",
                ".aws",
                (),
            ),
            ("tensors saved in forward", [], 'torch.save(input_ids, "x")', "file access", "torch.save, in forward", ()),
            ("terminal", ["import pty"], 'pty.spawn("true")', "processes", "pty.spawn", ()),
            ("environment as a value", ["import os"], "dict(os.environ)", "secrets access", "whole environment", ()),
            ("secret put together", [], '"~/.s" + "sh/id"', "secrets access", ".ssh/", ()),
            ("program by an unknown thing", [], 'self.config.popen("true")', "processes", "by popen of something", ()),
        ]
    ),
    Fault(
        "roundabout: through a sibling",
        both(
            prepend(LAYERS, "import os\n"),
            module("from .layers_tinymany import os as helper  # isort: skip"),
            in_forward('helper.system("true")'),
        ),
        "processes",
        MODELING,
        "by os.system, in forward",
    ),
    Fault(
        "run at import by a default",
        module("import os\n\n\ndef f(x=os.system('true')): ..."),
        "processes",
        MODELING,
        "as soon as it is imported",
    ),
    Fault(
        "only where the file is run",
        append(MODELING, '\n\nif __name__ == "__main__":\n    import subprocess\n    subprocess.run(["true"])\n'),
        "processes",
        MODELING,
        "only where the file is run as a program",
        "warning",
    ),
]
# what differs from a fault above in one thing, and is as it should be
TWINS = {
    "types of ctypes": both(
        module("import ctypes\n\n\nclass Pair(ctypes.Structure):\n    _fields_ = [('a', ctypes.c_int)]"),
        in_forward("ctypes.sizeof(ctypes.c_float)"),
    ),
    "paths of os": both(module("import os"), in_forward('os.path.join("a", os.sep)')),
    "attribute of torch by a dtype": in_forward('getattr(torch, str(self.dtype).split(".")[-1])'),
    "attribute of torch that is written out": in_forward('getattr(torch, "float" + "32")'),
    "attribute of itself by a variable": in_forward('getattr(self, "layers" if use_cache else "norm")'),
    "eval of a model": in_forward("self.eval()"),
    "compile of re": module("import re\nWORD = re.compile('a')"),
    "parameter called compile": module("def f(compile=False, eval=None):\n    return compile or eval"),
    "weights only": in_forward('torch.load("x", weights_only=True) if False else None'),
    "plain arrays": both(
        module("import numpy as np"), in_forward('np.load("x", allow_pickle=False) if False else None')
    ),
    "model of the folder": both(
        module("from transformers import AutoTokenizer"),
        in_forward("AutoTokenizer.from_pretrained(self.config._name_or_path) if False else None"),
    ),
    "own attribute called system": both(
        module("class Talk:\n    system = 'x'\n\n    def render(self):\n        return self.system"),
    ),
    "signature": both(module("import inspect"), in_forward("inspect.signature(self.forward)")),
    "fields of itself": in_forward("vars(self), self.__dict__, self.__class__.__name__"),
    "timer": both(module("import timeit"), in_forward("timeit.default_timer()")),
    "getattr over its own modules": in_forward('list(map(getattr, [self.config], ["vocab_size"]))'),
    "members of itself": both(module("import inspect"), in_forward("inspect.getmembers(self)")),
    "trust that the caller gives": module(
        "from transformers import AutoConfig\n\n\ndef read(folder, trust=False):\n"
        "    return AutoConfig.from_pretrained(folder, trust_remote_code=trust)"
    ),
    "own push_to_hub": append(
        MODELING,
        "\n\nclass Pushed(TinymanyModel):\n    def push_to_hub(self, *args, **kwargs):\n"
        "        return super().push_to_hub(*args, **kwargs)\n",
    ),
    "text by format": in_forward('"{} of {}".format("head", "layers"), "%s.weight" % "norm"'),
    "text in pieces": in_forward('"last" + "_hidden" + "_state"'),
}

_NETRC = "machine huggingface.co login me password k9Lm2pQ8xZ"
_SLACK = "https://hooks.slack.com/" + "services/T0ABCDEF1/B0ABCDEF1/aBcD3fGh1jKlMn0pQrStUvWx"
_DISCORD = "https://discord.com/api/" + "webhooks/123456789012345678/" + "aB3-dE5_" * 8


def object_array(folder: Path) -> None:
    np.save(folder / "table.npy", np.array([print, {"a": 1}], dtype=object), allow_pickle=True)


def object_archive(folder: Path) -> None:
    np.savez(folder / "table.npz", a=np.array([print, 1], dtype=object))


def plain_array(folder: Path) -> None:
    np.save(folder / "table.npy", np.arange(6.0).reshape(2, 3))
    np.savez(folder / "table.npz", a=np.arange(3))


TRUST += [
    Fault("login of .netrc", write("notes.txt", _NETRC), "secrets", "notes.txt:1", "a login of .netrc"),
    Fault("webhook of Slack", write("notes.txt", f"see\n{_SLACK}"), "secrets", "notes.txt:2", "a webhook of Slack"),
    Fault("webhook of Discord", write("notes.txt", _DISCORD), "secrets", "notes.txt:1", "a webhook of Discord"),
    Fault(
        "key of a service account",
        write("account.json", '{"private_key": "-----BEGIN ' + 'PRIVATE KEY-----\\nMIIEvQIBADANBg"}'),
        "secrets",
        "account.json:1",
        "a private key",
    ),
    Fault(
        "password in a setting",
        write("settings.yaml", "db_password: 'k39sKd02lsKDo30sla'"),
        "secrets",
        "settings.yaml:1",
        "a password or key in a setting",
    ),
    Fault("pickle in an array", object_array, "pickles", "table.npy", "print"),
    Fault("pickle in an archive of arrays", object_archive, "pickles", "table.npz", "print"),
    *(
        Fault(
            f"requirement from elsewhere: {line}",
            write("requirements.txt", f"torch\n{line}\n"),
            "requirements",
            "requirements.txt:2",
            what,
        )
        for line, what in [
            ("git+https://example.com/someone/else.git", "not on PyPI"),
            ("helpers @ https://example.com/helpers-1.0-py3-none-any.whl", "not on PyPI"),
            ("--index-url https://example.com/simple", "by --index-url"),
            ("--extra-index-url=https://example.com/simple", "by --extra-index-url"),
            ("-f https://example.com/wheels", "by -f"),
            ("--trusted-host example.com", "by --trusted-host"),
            ("-e ../helpers", "by -e"),
            ("./helpers-1.0.tar.gz", "a path"),
        ]
    ),
    Fault(
        "requirement of pyproject.toml from elsewhere",
        write("pyproject.toml", '[project]\ndependencies = ["helpers @ git+https://example.com/helpers"]\n'),
        "requirements",
        "pyproject.toml: project.dependencies",
        "not on PyPI",
    ),
]
TWINS |= {
    "no login of .netrc": write("notes.txt", "This machine learning model needs a login and a password."),
    "address of a service": write(
        "notes.txt", "https://hooks.slack.com/ and https://discord.com/api/webhooks are addresses"
    ),
    "arrays of numbers": plain_array,
    "password of the environment": write("settings.yaml", "db_password: ${DB_PASSWORD}"),
    "requirements of PyPI": write(
        "requirements.txt",
        "# see https://example.com\ntorch>=2.4  # not git+https://example.com/x\n--index-url https://pypi.org/simple\n"
        "--extra-index-url https://download.pytorch.org/whl/cpu\neinops==0.8.0\n",
    ),
}

_DIG = "def dig(of, name):\n    return getattr(of, name)"
_REDUCE = "class Kept:\n    def __reduce__(self):\n        return {0}, (1,)"
_META = "class Meta(type):\n    def __init__(cls, *given):\n        {0}\n\n\nclass Made(metaclass=Meta):\n    pass"
TRUST += [
    Fault("asks at the terminal", in_forward("input()"), "dynamic code", MODELING, "reads from the terminal"),
    Fault(
        "group of processes",
        both(module("import torch.distributed as dist"), in_forward("dist.init_process_group()")),
        "network",
        MODELING,
        "init_process_group",
    ),
    Fault(
        "annotations evaluated",
        both(module("import typing"), in_forward("typing.get_type_hints(self)")),
        "dynamic code",
        MODELING,
        "typing.get_type_hints",
    ),
    Fault(
        "pool of a context",
        both(module("import multiprocessing as mp"), in_forward("mp.get_context('fork').Pool(1)")),
        "processes",
        MODELING,
        "Pool, in forward",
    ),
    Fault(
        "what a module holds",
        in_forward("[v for k, v in torch.__dict__.items()]"),
        "dynamic code",
        MODELING,
        "goes through torch.__dict__",
    ),
    Fault(
        "own getter given a module",
        both(module(_DIG), in_forward("dig(torch, self.name)")),
        "dynamic code",
        MODELING,
        "taken by a variable",
    ),
    Fault("pickled as a call", module(_REDUCE.format("print")), "dynamic code", MODELING, "by __reduce__"),
    Fault("metaclass", module(_META.format("open('x', 'w')")), "file access", MODELING, "which runs as soon as"),
]
TWINS |= {
    "group asked for": both(module("import torch.distributed as dist"), in_forward("dist.is_initialized()")),
    "own getter given itself": both(module(_DIG), in_forward("dig(self, use_cache)")),
    "pickled as its class": module(_REDUCE.format("self.__class__")),
    "metaclass that does nothing": module(_META.format("pass")),
}
