"""Criss-cross attention as CCNet's PyTorch version writes it: batched products of permuted copies."""

import torch


def eager(query, key, value):
    batch, _, height, width = value.shape

    def columns(t):
        return t.permute(0, 3, 1, 2).reshape(batch * width, -1, height)

    def rows(t):
        return t.permute(0, 2, 1, 3).reshape(batch * height, -1, width)

    own = torch.diag(torch.full((height,), -torch.inf, device=query.device)).unsqueeze(0)
    column = (torch.bmm(columns(query).permute(0, 2, 1), columns(key)) + own).view(batch, width, height, height).permute(0, 2, 1, 3)
    row = torch.bmm(rows(query).permute(0, 2, 1), rows(key)).view(batch, height, width, width)
    weight = torch.softmax(torch.cat([column, row], 3), dim=3)
    weight_column = weight[..., :height].permute(0, 2, 1, 3).reshape(batch * width, height, height)
    weight_row = weight[..., height:].reshape(batch * height, width, width)
    from_column = torch.bmm(columns(value), weight_column.permute(0, 2, 1)).view(batch, width, -1, height).permute(0, 2, 3, 1)
    from_row = torch.bmm(rows(value), weight_row.permute(0, 2, 1)).view(batch, height, -1, width).permute(0, 2, 1, 3)
    return from_column + from_row
