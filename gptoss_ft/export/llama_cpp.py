"""Open GGUF exports with llama.cpp, through llama-cpp-python.

T tokens · P chosen positions · V vocabulary
"""

import ctypes
import logging
import os
import weakref
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from gptoss_ft.errors import UserError
from gptoss_ft.export.gguf_layout import MODEL_FILE
from gptoss_ft.export.merge import merge
from gptoss_ft.export.readers import NotRun
from gptoss_ft.model.checkpoint import Checkpoint

INSTALL = "pip install llama-cpp-python (it compiles for some minutes)"


def open_adapter_with_llama_cpp(base: Path, adapter: Path) -> "LlamaCpp":
    """An adapter file beside its base, which is written as GGUF to a temporary folder next to the adapter's.

    Raises:
        NotRun: if llama-cpp-python is not installed or the disk has no room for the base.
        UserError: if llama.cpp refuses a file.
    """
    _import_llama_cpp()
    checkpoint = Checkpoint.open(base)
    folder = TemporaryDirectory(prefix=".gptoss-ft-", dir=adapter.parent.parent)
    try:
        merge(checkpoint, {}, Path(folder.name) / "base", format="gguf", progress=False)
    except UserError as reason:
        raise NotRun(f"the base cannot be written as GGUF: {reason}") from reason
    reader = LlamaCpp(Path(folder.name) / "base" / MODEL_FILE, adapter)
    weakref.finalize(reader, folder.cleanup)
    return reader


class LlamaCpp:
    """A loaded model that reads one sequence at a time, its keys and values in fp32."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        """Load a model file, and an adapter file that is to act on it.

        Raises:
            NotRun: if llama-cpp-python is not installed.
            UserError: if llama.cpp refuses a file.
        """
        self.library = library = _import_llama_cpp()
        options = library.llama_model_default_params()
        options.n_gpu_layers = 0
        # Repacked for speed, the experts would be in memory a second time.
        options.use_extra_bufts = False
        self.model = library.llama_model_load_from_file(os.fsencode(file), options)
        if not self.model:
            raise UserError(f"{file}: llama.cpp does not load it: export again")
        weakref.finalize(self, library.llama_model_free, self.model)
        self.adapter = adapter and library.llama_adapter_lora_init(self.model, os.fsencode(adapter))
        if adapter and not self.adapter:
            raise UserError(f"{adapter}: llama.cpp does not load it beside its base: export again")
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))

    def __call__(self, input_ids_T: Tensor, positions_P: Tensor) -> Tensor:
        library, num_tokens = self.library, len(input_ids_T)
        context = self._context(num_tokens)
        batch = library.llama_batch_init(num_tokens, 0, 1)
        try:
            wanted = set(positions_P.tolist())
            batch.n_tokens = num_tokens
            for position, token in enumerate(input_ids_T.tolist()):
                batch.token[position], batch.pos[position] = token, position
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
                batch.logits[position] = position in wanted
            if library.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp failed on a sequence of {num_tokens} tokens")
            rows = (library.llama_get_logits_ith(context, position) for position in positions_P.tolist())
            return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows]))
        finally:
            library.llama_batch_free(batch)
            library.llama_free(context)

    def _context(self, num_tokens: int) -> ctypes.c_void_p:
        library = self.library
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = num_tokens
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.type_k = options.type_v = library.GGML_TYPE_F32
        context = library.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError(f"llama.cpp has no memory for a sequence of {num_tokens} tokens")
        if self.adapter:
            adapters = (library.llama_adapter_lora_p_ctypes * 1)(self.adapter)
            library.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        return context


def _import_llama_cpp() -> ModuleType:
    try:
        library = import_module("llama_cpp")
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise NotRun(f"llama-cpp-python is not installed: {INSTALL}") from error
    # Its own table of llama.cpp's log levels is a version behind, so that warnings count as errors.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    return library
