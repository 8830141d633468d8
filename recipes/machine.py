"""What the environment asks of this machine, checked before a recipe loads or writes anything."""

from gptoss_ft.errors import UserError
from gptoss_ft.kernels import cpu_library
from gptoss_ft.kernels.gpu import packed_experts


def check_variables() -> None:
    """Refuse a GPTOSS_FT_CPU_ISA or GPTOSS_FT_FUSED_ROWS that cannot be followed.

    Raises:
        UserError: naming what can be.
    """
    try:
        packed_experts.fused_rows()
        # Without a library there is nothing that its variable could choose among.
        if cpu_library.library() is not None:
            cpu_library.selected_isa()
    except ValueError as error:
        raise UserError(str(error)) from None
