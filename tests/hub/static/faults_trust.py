"""Code that nobody should trust unread."""

from edits import MODELING, Fault, both, in_forward, module, replace, write

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
        "reaches into builtins by getattr",
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
    Fault("text turned round", in_forward("x = 'a\u202eb'"), "obfuscation", MODELING, "turns the direction"),
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
]
