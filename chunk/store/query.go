package store

import (
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// query answers what the index alone knows.
func (s *Store) query(c *caller, v *vol, q *wire.Request, out *outbox) error {
	rep := &wire.Reply{Kind: q.Kind, ID: q.ID}
	var err error
	if q.Flags&wire.FlagFrozen != 0 {
		rep.Incarnation = s.incarnation
	}
	switch {
	case q.Kind == wire.Digest:
		rep.Digests, err = s.digests(v, q)
	case v == nil:
	case q.Kind == wire.Newer:
		err = s.newer(v, q, rep)
	case q.Kind == wire.Damaged:
		s.damaged(q, rep)
	case q.Kind == wire.List && q.Chunk == 0:
		s.listLives(v, rep)
	case q.Kind == wire.List:
		err = s.list(v, q, rep)
	default:
		rep.Epoch, rep.Count64 = v.epoch, v.live
	}
	if err != nil {
		return err
	}
	out.reply(c, rep)
	return nil
}

// eachEntry calls f for the entries of blocks [from, to) of c whose page may
// hold a version above than; f returns false to stop. Blocks that were set back
// to holes are none.
func (s *Store) eachEntry(c *chunk, from, to ids.Block, than ids.Version, f func(wire.Entry) bool) (bool, error) {
	for n := uint32(from) / pageBlocks; n < uint32(len(c.pages)) && n*pageBlocks < uint32(to); n++ {
		if c.pages[n] == nil || c.pages[n].top <= than {
			continue
		}
		p, err := s.idx.page(c, n, false)
		if err != nil {
			return false, err
		}
		for i := range uint32(pageBlocks) {
			e, b := p.at(i), ids.Block(n*pageBlocks+i)
			if e.kind == kindHole || e.version <= than || b < from || b >= to {
				continue
			}
			if !f(wire.Entry{Chunk: c.id, Layer: c.layer, Block: b, Version: e.version, Sum: e.sum, Kind: wire.EntryKind(e.kind)}) {
				return false, nil
			}
		}
		s.idx.trim(trimSteps)
	}
	return true, nil
}

// newer lists what is above a version, in order of (chunk, layer, block).
func (s *Store) newer(v *vol, q *wire.Request, rep *wire.Reply) error {
	limit := wire.MaxEntries
	if q.Count > 0 {
		limit = min(limit, int(q.Count))
	}
	start := chunkKey{q.Chunk, q.Layer}
	i, _ := slices.BinarySearchFunc(v.order, start, (*chunk).compare)
	for _, c := range v.order[i:] {
		from := ids.Block(0)
		if c.id == q.Chunk && c.layer == q.Layer {
			from = q.Block
		}
		more, err := s.eachEntry(c, from, maxChunkBlocks, q.Version, func(e wire.Entry) bool {
			if len(rep.Entries) == limit {
				rep.Flags |= wire.FlagMore
				return false
			}
			rep.Entries = append(rep.Entries, e)
			return true
		})
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// layers returns the layers of a chunk, in order.
func (v *vol) layers(id ids.ChunkID) []*chunk {
	i, _ := slices.BinarySearchFunc(v.order, chunkKey{id, 0}, (*chunk).compare)
	j := i
	for j < len(v.order) && v.order[j].id == id {
		j++
	}
	return v.order[i:j]
}

// list returns a chunk's entries of a range, layer by layer.
func (s *Store) list(v *vol, q *wire.Request, rep *wire.Reply) error {
	for _, c := range v.layers(q.Chunk) {
		fits, err := s.eachEntry(c, q.Block, q.Block+ids.Block(q.Count), 0, func(e wire.Entry) bool {
			rep.Entries = append(rep.Entries, e)
			return len(rep.Entries) <= wire.MaxEntries
		})
		if err != nil {
			return err
		}
		if !fits {
			why := status.Errorf(status.TooBig, "the list of %d blocks is over the limit of %d entries: ask for fewer", q.Count, wire.MaxEntries)
			*rep = wire.Reply{Kind: q.Kind, ID: q.ID, Status: status.TooBig, Detail: why.Error()}
			return nil
		}
	}
	return nil
}

// listLives tells the life of each chunk of a volume, as many as fit.
func (s *Store) listLives(v *vol, rep *wire.Reply) {
	for i, c := range v.order {
		if i > 0 && v.order[i-1].id == c.id {
			continue // another layer of it
		}
		if rep.Digests = append(rep.Digests, uint64(c.id), s.lifeOf(v, c.id)); len(rep.Digests) >= wire.MaxLives {
			return
		}
	}
}

// digests sums up a chunk's entries below a version, range by range.
func (s *Store) digests(v *vol, q *wire.Request) ([]uint64, error) {
	out := make([]uint64, (q.Count+wire.DigestBlocks-1)/wire.DigestBlocks)
	if v == nil {
		return out, nil
	}
	for _, c := range v.layers(q.Chunk) {
		_, err := s.eachEntry(c, 0, ids.Block(q.Count), 0, func(e wire.Entry) bool {
			if e.Version < q.Limit {
				out[e.Block/wire.DigestBlocks] += wire.EntryDigest(e)
			}
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}
