"""Sums over table rows against plain sums and the plain attention that they stand for."""

import pytest
import torch

from valle.modules.bags import CHUNK, BagCache, weighted_sums

HEADS, DIM = 3, 4
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weighted_sums_are_sums_of_weighted_rows(dtype):
    torch.manual_seed(0)
    table, sizes = torch.randn(9, 5).to(dtype), [1, 4, 0, 7]
    rows = torch.randint(9, (sum(sizes),), dtype=torch.int32)
    weights = torch.randn(sum(sizes)).to(dtype)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0)[:-1]], dtype=torch.int32)
    found = weighted_sums(table, rows, starts, weights)
    expected, place = torch.zeros(4, 5), 0
    for bag, size in enumerate(sizes):
        for _ in range(size):
            expected[bag] += float(weights[place]) * table[int(rows[place])].float()
            place += 1
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


class Recording:
    """A cache of bags and everything that was put into it, by row: (H, time, d) keys and values."""

    def __init__(self, prompt_lens, dtype, capacity, seed=0):
        self.draw = torch.Generator().manual_seed(seed)
        batch, longest = len(prompt_lens), max(prompt_lens)
        self.cache = BagCache(2, batch, HEADS, capacity, DIM, dtype)
        self.cache.prompt_lens = torch.tensor(prompt_lens)
        self.cache.starts = longest - self.cache.prompt_lens
        self.cache.ragged = min(prompt_lens) < longest
        self.rows = [[] for _ in range(batch)]  # by row: two layers of (keys, values)
        for layer in self.cache.layers:
            keys, values = self.normal(2, batch, HEADS, longest, DIM)
            given = layer.append(keys, values)
            assert given[0] is keys and given[1] is values, "the prompt attends to itself unrounded"
            for row, start in enumerate(self.cache.starts.tolist()):
                self.rows[row].append([keys[row, :, start:], values[row, :, start:]])

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.draw)

    def step(self):
        """One more frame; the cache's answer and the naive one, (layers, rows, H · d)."""
        self.cache.make_room()
        found, expected = [], []
        for number, layer in enumerate(self.cache.layers):
            query, key, value = self.normal(3, len(self.rows), HEADS, DIM)
            found.append(layer.attend(query, key, value).float())
            for row, layers in enumerate(self.rows):
                layers[number] = [
                    torch.cat([old, new[row][:, None]], 1)
                    for old, new in zip(layers[number], (key, value), strict=True)
                ]
            expected.append(
                torch.stack([self.naive(row, number, query[row]) for row in range(len(self.rows))])
            )
        return torch.stack(found), torch.stack(expected)

    def naive(self, row, number, query):
        keys, values = self.rows[row][number]
        out = torch.zeros(HEADS, DIM)
        for head in range(HEADS):
            weights = (keys[head] @ query[head]).softmax(0)
            out[head] = sum(weight * value for weight, value in zip(weights, values[head], strict=True))
        return out.view(-1)

    def drop(self, row):
        self.cache.drop(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("prompt_lens", [(1,), (CHUNK - 1, 5, 1), (CHUNK, CHUNK), (3, CHUNK + 1)], ids=str)
def test_attention_by_bags_is_attention(dtype, prompt_lens):
    recording = Recording(prompt_lens, dtype, 3 * CHUNK)
    for _ in range(CHUNK + 3):  # over at least one end of a chunk
        found, expected = recording.step()
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert recording.cache.length == max(prompt_lens) + CHUNK + 3


@pytest.mark.parametrize("steps", [0, 1, CHUNK - 9, CHUNK])
@pytest.mark.parametrize("row", range(4))
def test_whoever_leaves_the_others_are_as_in_a_cache_of_their_own(row, steps):
    """The prompts' 9 columns and the steps end before, at and behind the end of a chunk."""
    recording = Recording((9, 2, 5, 7), torch.float32, 2 * CHUNK)
    for _ in range(steps):
        recording.step()
    starts = recording.cache.starts.tolist()
    recording.drop(row)
    starts[row] = starts[-1]
    assert recording.cache.rows == 3 and recording.cache.starts.tolist() == starts[:3]
    for _ in range(3):
        found, expected = recording.step()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    recording.drop(0), recording.drop(1)
    found, expected = recording.step()
    assert found.shape == (2, 1, HEADS * DIM)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dropping_leaves_the_callers_lengths_alone():
    cache = BagCache(1, 3, HEADS, 8, DIM, torch.float32)
    given = [torch.tensor([0, 1, 2]), torch.tensor([5, 4, 3]), torch.tensor([0, 0, 1])]
    cache.starts, cache.prompt_lens, cache.position_shift = given
    cache.drop(0)
    assert [values.tolist() for values in given] == [[0, 1, 2], [5, 4, 3], [0, 0, 1]]
    assert cache.prompt_lens.tolist() == [3, 4] and cache.position_shift.tolist() == [1, 0]


def test_room_is_taken_in_whole_chunks_and_its_end_is_named():
    cache = BagCache(1, 2, HEADS, CHUNK + 1, DIM, torch.float32)
    for _ in range(2 * CHUNK):
        cache.make_room()
    with pytest.raises(RuntimeError, match=f"room for {2 * CHUNK} frames"):
        cache.make_room()
