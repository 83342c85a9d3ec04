// The layout of the map: a row a node, in the order of a walk through the tree, and a lane for how far to the right.
//
// A node's newest child follows it in its own lane; older children branch off into the next lane, above it. So the way
// that was taken last runs straight down, no line crosses another, and twenty turns need no twenty columns.

import { childrenByParent, rootOf } from "./conversation.js";

/** [{node, row, lane, level, position, siblings, parentRow}], level and position counted from 1, parentRow null at the root. */
export function lanes(doc) {
  const children = childrenByParent(doc);
  const rows = [];
  const todo = [{ node: rootOf(doc), lane: 0, level: 1, position: 1, siblings: 1, parentRow: null }];
  while (todo.length) {
    const place = { ...todo.pop(), row: rows.length };
    rows.push(place);
    const below = children.get(place.node.id) ?? [];
    const next = below.map((node, i) => ({
      node,
      lane: i === below.length - 1 ? place.lane : place.lane + 1,
      level: place.level + 1,
      position: i + 1,
      siblings: below.length,
      parentRow: place.row,
    }));
    todo.push(...next.reverse());
  }
  return rows;
}
