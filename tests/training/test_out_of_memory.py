import jax
import pytest

from hybrid_jax.training.out_of_memory import OutOfMemory, check_state_fits, explained

ON_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
ON_TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.51G of 15.75G hbm. Exceeded hbm capacity by 4.76G.\nProgram jit_ppo_learn: ..."
)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (ON_GPU, r"ppo: .* \(17179869184 bytes\);"),
        (ON_TPU, r"ppo, program ppo_learn: .* \(Used 20.51G of 15.75G\);"),
    ],
)
def test_what_ran_out_of_memory_and_what_helps_are_one_line(text, where):
    with pytest.raises(OutOfMemory, match=where) as caught, explained("ppo"):
        raise jax.errors.JaxRuntimeError(text)
    message = str(caught.value)
    assert "\n" not in message
    for help in (
        "execution.remat full",
        "microbatches",
        "mesh.fsdp",
        "--allow-change",
        "bfloat16",
        "hybrid_jax.plan",
    ):
        assert help in message
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_other_errors_pass_as_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained("ppo"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_real_program_that_no_memory_holds_is_explained():
    with pytest.raises(OutOfMemory, match="sft: a device is out of memory"), explained("sft"):
        jax.block_until_ready(jax.numpy.zeros((1 << 46,), "int8"))


def test_a_state_larger_than_the_machine_is_one_line_before_anything_is_made():
    check_state_fits({"kernel": jax.ShapeDtypeStruct((1024, 1024), "float32")})
    with pytest.raises(
        OutOfMemory, match=r"the state of the run needs 4,194,304 GiB, this machine has [\d,]+;"
    ):
        check_state_fits({"kernel": jax.ShapeDtypeStruct((2**25, 2**25), "float32")})
