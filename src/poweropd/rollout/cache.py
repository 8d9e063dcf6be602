"""Keys and values of rows of different lengths."""

import torch
from torch import Tensor

CHUNK = 64  # tokens: the cache grows by multiples of it


class KeyValueCache:
    """Keys and values of every layer in slots that are written in place, one slot a row, its tokens from place 0 on.

    It holds what rows have needed so far, not what they may need at most: it grows by half.

    Args:
        rows: slots.
        tokens: most tokens of a row.
        shape: of the keys of one token: heads, head size.
    """

    def __init__(
        self, *, layers: int, rows: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._limit = tokens
        # Zeros, since what lies beyond a row's end is read and multiplied by 0.
        nothing = torch.zeros(rows, 0, *shape, dtype=dtype, device=device)
        self.keys, self.values = [nothing] * layers, [nothing] * layers

    @property
    def capacity(self) -> int:
        """Tokens a row has room for."""
        return self.keys[0].shape[1]

    def reserve(self, tokens: int) -> bool:
        """Make room for rows of so many tokens; whether the cache has moved for it."""
        if tokens <= self.capacity:
            return False
        wanted = max(tokens, self.capacity * 3 // 2)
        room = min(-(-wanted // CHUNK) * CHUNK, self._limit) - self.capacity
        for slots in (self.keys, self.values):
            for layer, old in enumerate(slots):  # one by one: never two whole caches
                slots[layer] = torch.nn.functional.pad(old, (0, 0, 0, 0, 0, room))
        return True

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """One token a row: `[n, heads, head size]`, to places [n] counted through all slots."""
        self.keys[layer].flatten(0, 1).index_copy_(0, places, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, places, values)

    def move(self, targets: Tensor, sources: Tensor, tokens: int) -> None:
        """Rows `sources`, of at most so many tokens, take the places of rows `targets`."""
        for slots in (*self.keys, *self.values):
            slots[targets, :tokens] = slots[sources, :tokens]
