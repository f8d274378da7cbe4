"""Small stand-ins for a model, a codec and cuts, with known answers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from torch import Tensor, nn

from valle.codecs.base import Codec
from valle.models import Generation
from valle.models.prompts import Prompts
from valle.utils.audio import save_audio

CODES = 12  # values of a code: more than ten, so that top-10 can miss
QUANTIZERS = 3
RATE, HOP = 8000, 160  # 50 frames per second


class ToneCodec(Codec):
    """Code c of quantizer 0 is a tone of 200 + 100 c Hz; the others make it quieter or louder."""

    name, sample_rate, channels, hop_length = "tone", RATE, 1, HOP
    num_quantizers, codebook_size = QUANTIZERS, CODES

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, wav: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        pitch = (200 + 100 * codes[..., 0].float()).repeat_interleave(HOP, dim=1)  # (B, N)
        loudness = (0.1 + 0.02 * codes[..., 1].float()).repeat_interleave(HOP, dim=1)
        return (loudness * torch.sin(2 * torch.pi * pitch.cumsum(dim=1) / RATE))[:, None]


class CountingModel(nn.Module):
    """Knows that the next code is one more than the last, and that quantizer q is quantizer q - 1 plus one.

    The right code has logit log(9), every other and the end symbol have 0; padding changes nothing that it reads
    at real frames. Generation repeats the rule and stops after `stop_after` frames.
    """

    num_quantizers, codebook_size = QUANTIZERS, CODES

    def __init__(self, stop_after: int = 1000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.stop_after = stop_after
        self.calls = 0  # of generate

    def ar_logits(self, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        last = x[torch.arange(len(x)), x_lens - 1, 0]
        context = torch.cat([last[:, None], y], dim=1)  # (B, T + 1)
        return self._logits((context + 1) % CODES, CODES + 1)

    def nar_logits(self, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor, quantizer: int) -> Tensor:
        return self._logits((y[..., quantizer - 1] + 1) % CODES, CODES)

    def forced_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor) -> Iterator[Tensor]:
        yield self.ar_logits(prompts.codes, prompts.lens, y[..., 0], y_lens)[:, : y.shape[1]]
        for quantizer in range(1, QUANTIZERS):
            yield self.nar_logits(prompts.codes, prompts.lens, y, y_lens, quantizer)

    def inference(
        self,
        x: Tensor,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int = 50,
        seed: int | None = None,
    ) -> Tensor:
        new = min(max_new_tokens, self.stop_after)
        first = (x[:, -1:, 0] + 1 + torch.arange(new)) % CODES  # (B, new)
        codes = torch.stack([(first + q) % CODES for q in range(QUANTIZERS)], dim=-1)
        return torch.cat([x, codes], dim=1)

    def generate(
        self,
        x: Tensor,
        x_lens: Tensor,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int = 50,
        seed: int | None = None,
    ) -> Generation:
        """The rule; a seed's last digit says how many codes later it begins, so that seeds differ."""
        rows, self.calls = [], self.calls + 1
        for prompt, length in zip(x, x_lens.tolist(), strict=True):
            start = prompt[None, :length].clone()
            start[:, -1] = (start[:, -1] + (seed or 0) % 10) % CODES
            full = self.inference(start, max_new_tokens)[0]
            rows.append(torch.cat([prompt[:length], full[length:]]))
        reason = "eos" if self.stop_after < max_new_tokens else "length"
        return Generation(rows, x_lens.tolist(), [reason] * len(rows), [torch.zeros(0)] * len(rows))

    def _logits(self, right: Tensor, size: int) -> Tensor:
        return torch.nn.functional.one_hot(right, size).float() * float(np.log(9.0))


def counting_codes(frames: int, seed: int, errors: float = 0.2) -> np.ndarray:
    """(T, Q) codes that follow the rule of `CountingModel`, but for some errors."""
    generator = np.random.default_rng(seed)
    first = (generator.integers(CODES) + np.arange(frames)) % CODES
    codes = np.stack([(first + q) % CODES for q in range(QUANTIZERS)], axis=1)
    wrong = generator.random(codes.shape) < errors
    return np.where(wrong, generator.integers(CODES, size=codes.shape), codes)


@pytest.fixture
def codec() -> ToneCodec:
    return ToneCodec()


@pytest.fixture
def make_model():
    return CountingModel


@pytest.fixture
def make_codes():
    return counting_codes


@pytest.fixture
def make_cut(tmp_path):
    """Writes a recording of `codes` and gives its cut; the codes stay in `cut.custom`."""

    def make(cut_id: str, codes: np.ndarray) -> MonoCut:
        wav = ToneCodec().decode(torch.from_numpy(codes[None]))[0].detach().numpy()
        noise = 0.005 * np.random.default_rng(len(codes)).standard_normal(wav.shape)
        path = tmp_path / "audio" / f"{cut_id}.wav"
        save_audio(path, wav + noise, RATE)
        recording = Recording.from_file(path, recording_id=cut_id)
        words = SupervisionSegment(cut_id, cut_id, 0.0, recording.duration, text=f"words of {cut_id}")
        custom = {"codes": codes.tolist()}
        return MonoCut(cut_id, 0.0, recording.duration, 0, [words], recording=recording, custom=custom)

    return make
