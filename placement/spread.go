package placement

import (
	"cmp"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
)

// Placed is a chunk where it is.
type Placed struct {
	Bytes  uint64
	Stores []ids.StoreID
	Keep   ids.StoreID // a copy that stays: its reader is there
}

// ChunkMove takes one replica of a chunk to another store.
type ChunkMove struct {
	Chunk    int
	From, To ids.StoreID
}

// Even plans the moves that bring every store within slack of its kind's mean fill:
// after a store came, or one is to be emptied (capacity 0). A replica goes only
// from a store above the mean to one below it, each once, so that no plan moves
// more than the theoretical minimum and the last chunk's rounding. Domains stay
// apart. At most movesMax moves; planning again goes on from there.
func Even(stores []Store, chunks []Placed, slack float64, movesMax int) (moves []ChunkMove) {
	means := map[bool]float64{false: meanFill(stores, false), true: meanFill(stores, true)}
	type bin struct {
		Store
		chunks []int
	}
	bins := map[ids.StoreID]*bin{}
	order := make([]*bin, 0, len(stores))
	for _, s := range stores {
		if s.Domain == "" {
			s.Domain = s.Host
		}
		b := &bin{Store: s}
		bins[s.ID], order = b, append(order, b)
	}
	for i, c := range chunks {
		for _, id := range c.Stores {
			if b := bins[id]; b != nil {
				b.chunks = append(b.chunks, i)
			}
		}
	}
	at := make([][]ids.StoreID, len(chunks)) // where a moved chunk is by then
	where := func(c int) []ids.StoreID {
		if at[c] != nil {
			return at[c]
		}
		return chunks[c].Stores
	}
	over := func(b *bin) float64 { return float64(b.UsedBytes) - means[b.Slow]*float64(b.CapacityBytes) }
	slices.SortFunc(order, func(a, b *bin) int {
		return cmp.Or(cmp.Compare(over(b), over(a)), slices.Compare(a.ID[:], b.ID[:]))
	})
	fits := func(c int, from, to *bin) bool {
		if !to.Up || to.Slow != from.Slow || over(to)+float64(chunks[c].Bytes) > 0 {
			return false
		}
		for _, id := range where(c) {
			if o := bins[id]; id == to.ID || o != nil && id != from.ID && o.Domain == to.Domain {
				return false
			}
		}
		return true
	}
	for _, from := range order {
		allowed := slack * means[from.Slow] * float64(from.CapacityBytes)
		for _, c := range from.chunks {
			if over(from) <= allowed || len(moves) >= movesMax {
				break
			}
			if chunks[c].Keep == from.ID {
				continue
			}
			best := (*bin)(nil)
			for _, to := range order {
				if fits(c, from, to) && (best == nil || over(to) < over(best)) {
					best = to
				}
			}
			if best == nil {
				continue
			}
			now := slices.Clone(where(c))
			now[slices.Index(now, from.ID)] = best.ID
			at[c] = now
			from.UsedBytes -= min(from.UsedBytes, chunks[c].Bytes)
			best.UsedBytes += chunks[c].Bytes
			moves = append(moves, ChunkMove{c, from.ID, best.ID})
		}
	}
	return moves
}
