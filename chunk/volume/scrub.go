package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// What a store's scrub has found bad is repaired without waiting for a read to
// meet it: the engine asks its in-sync replicas now and then, and copies each
// block from another one over the bad copy, at the version it has. A block that
// is bad everywhere is left: a read answers with an error, an overwrite heals it.
const (
	damageEvery = 10 * time.Second
	// damageBatch bounds the repairs under way for one replica.
	damageBatch = 32
)

// askDamage asks every readable replica what it knows to be bad.
func (e *Engine) askDamage() {
	if e.state != Serving || e.now < e.damageAt || len(e.replicas) < 2 {
		return
	}
	e.damageAt = e.now + damageEvery
	for _, r := range e.replicas {
		if !r.readable() || r.repairing > 0 {
			continue
		}
		e.call(r, &wire.Request{Kind: wire.Damaged, Count: damageBatch}, func(rep *wire.Reply) {
			if rep.Status != status.OK || !r.readable() { // an older store does not know: reads still repair
				return
			}
			for _, en := range rep.Entries {
				e.healBlock(r, en)
			}
		})
	}
}

// healBlock copies one block over a bad copy.
func (e *Engine) healBlock(r *replica, bad wire.Entry) {
	var sources []*replica
	for _, c := range e.sortedChunks() {
		if c.id != bad.Chunk {
			continue
		}
		for _, s := range c.replicas {
			if s != r && s.readable() {
				sources = append(sources, s)
			}
		}
	}
	r.repairing++
	e.healFrom(r, bad, sources)
}

func (e *Engine) healFrom(r *replica, bad wire.Entry, sources []*replica) {
	if len(sources) == 0 {
		r.repairing--
		return
	}
	q := &wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Chunk: bad.Chunk, Layer: bad.Layer, Block: bad.Block, Count: 1}
	e.call(sources[0], q, func(rep *wire.Reply) {
		good := rep.Status == status.OK && len(rep.Entries) == 1 && len(rep.Data) == ids.BlockSize && rep.Entries[0].Version == bad.Version &&
			entriesMatch(e.volume, q, rep.Entries, rep.Data)
		if !good { // bad there too, or overwritten meanwhile
			e.healFrom(r, bad, sources[1:])
			return
		}
		en := rep.Entries[0]
		var data []byte
		if en.Kind == wire.EntryData {
			data = append(data, rep.Data...)
		}
		fix := &wire.Request{Kind: wire.Install, Flags: wire.FlagRepair, Chunk: bad.Chunk, Layer: bad.Layer, Entries: []wire.Entry{en}, Data: data, Limit: en.Version + 1}
		e.call(r, fix, func(rep *wire.Reply) {
			r.repairing--
			if rep.Status == status.OK {
				e.stats.Repaired++
			}
		})
	})
}
