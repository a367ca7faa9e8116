"""Pictures from embeddings."""

import pytest
import torch

from jepa.picture_decoder import PictureDecoder
from pipelines.run.artefacts import load_module, save_artefact

SHAPES = [((6,), (34, 20)), ((2, 3, 6), (34, 20)), ((20, 10, 6), (64, 32)), ((2, 2, 2, 6), (16, 16))]


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_it_begins_as_the_mean_picture_and_is_built_again(shape, size, tmp_path):
    decoder = PictureDecoder(shape, size, width=64, encoder_fingerprint="0123abcd")
    decoder.mean_picture.uniform_()
    pictures = decoder(torch.randn(5, *shape))
    torch.testing.assert_close(pictures, decoder.mean_picture.expand(5, 3, *size))
    with torch.no_grad():
        decoder.leave.weight.normal_()
    save_artefact(tmp_path / "decoder", "picture_decoder", decoder.description(), decoder)
    again = load_module(tmp_path / "decoder", "picture_decoder", lambda known: PictureDecoder(**known))
    embeddings = torch.randn(5, *shape)
    assert torch.equal(again(embeddings), decoder(embeddings))


@pytest.mark.parametrize("grid", [(), (4, 4)])
def test_it_learns_where_things_are(grid):
    torch.manual_seed(0)
    places = torch.rand(256, 2)  # of a bright square, as (row, column)
    middles = (torch.arange(32) + 0.5) / 32
    inside = [(middles - places[:, axis, None]).abs() < 0.15 for axis in (0, 1)]
    pictures = (inside[0][:, :, None] & inside[1][:, None, :]).float()[:, None].expand(-1, 3, -1, -1)
    cells = torch.nn.functional.adaptive_avg_pool2d(pictures, grid or 1)[:, :1]  # how much of the square is in each
    embeddings = cells.permute(0, 2, 3, 1) if grid else places
    decoder = PictureDecoder(embeddings.shape[1:], (32, 32), width=64, encoder_fingerprint="")
    decoder.mean_picture.copy_(pictures.mean(dim=0))
    adam = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    for _ in range(100):
        adam.zero_grad()
        loss = (decoder(embeddings) - pictures).square().mean()
        loss.backward()
        adam.step()
    assert loss.item() < 0.4 * float(pictures.var(dim=0).mean())
