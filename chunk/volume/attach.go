package volume

import (
	"fmt"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// attach is the way from a committed epoch to serving:
//
//	seal → exclude who was not reached → reconcile what was written since the
//	floor → flush and settle → serve
//
// Any failure on the way goes back to seal; nothing was read or written for a
// client yet.
type attach struct {
	phase   attachPhase
	started time.Duration
	try     int // tells the answers of this round from those of an earlier one
	pending int
	floor   ids.Version
	best    map[blockKey]held
	has     map[*replica]map[blockKey]ids.Version
	queue   []blockKey
}

type attachPhase uint8

const (
	attachSeal attachPhase = iota
	attachExclude
	attachList
	attachCopy
	attachFlush
)

// copyWindow bounds the blocks that reconciliation and join have in flight.
const copyWindow = 64

type blockKey struct {
	chunk ids.ChunkID
	layer ids.LayerID
	block ids.Block
}

type held struct {
	entry wire.Entry
	by    *replica
}

func (e *Engine) beginAttach() {
	e.state = Attaching
	e.alloc.pieces = map[ids.ChunkIndex][]piece{}
	e.attach = &attach{started: e.now}
}

// stepAttach goes as far as it can.
func (e *Engine) stepAttach() {
	a := e.attach
	if a == nil || a.phase != attachSeal || e.member.call != nil {
		return
	}
	var reached, unreached []*replica
	allLost := true
	for _, r := range e.replicas {
		switch {
		case !r.inSync:
		case r.up && r.sealed && !r.excluding:
			reached = append(reached, r)
		default:
			unreached = append(unreached, r)
			allLost = allLost && (r.lost || r.excluding)
		}
	}
	if len(unreached) == 0 {
		e.beginReconcile(reached)
		return
	}
	if why := e.insufficient(); why != "" {
		e.why = why
		return
	}
	if allLost || e.now-a.started >= e.cfg.SealWait {
		a.phase = attachExclude
		e.commitExclusion(unreached)
	}
}

// insufficient says why the sealed members are not enough: every chunk needs
// one that has everything acknowledged — one that lost nothing since the
// floor, or all of its in-sync members together.
func (e *Engine) insufficient() string {
	for _, c := range e.chunks {
		whole, all := false, true
		for _, r := range c.replicas {
			sealed := r.inSync && r.up && r.sealed && !r.excluding
			whole = whole || (sealed && r.intact)
			all = all && (!r.inSync || sealed)
		}
		if !whole && !all {
			return fmt.Sprintf("waiting for a member that holds everything written to chunk %d", c.index)
		}
	}
	return ""
}

// beginReconcile asks every member what it holds above the highest floor any
// of them has logged.
func (e *Engine) beginReconcile(members []*replica) {
	a := e.attach
	a.phase, a.try, a.pending = attachList, a.try+1, 0
	a.best, a.has, a.floor = map[blockKey]held{}, map[*replica]map[blockKey]ids.Version{}, 0
	for _, r := range members {
		a.floor = max(a.floor, r.floor)
	}
	for _, r := range members {
		a.has[r] = map[blockKey]ids.Version{}
		a.pending++
		e.listNewer(r, wire.Request{Kind: wire.Newer, Version: a.floor})
	}
	if a.pending == 0 {
		e.listed()
	}
}

// attachFailed goes back to sealing, if the answer is of the running try.
func (e *Engine) attachFailed(r *replica, rep *wire.Reply) {
	e.attach.phase = attachSeal
	if rep.Status != status.Unavailable {
		e.exclude(r, rep.Err().Error())
	}
}

func (e *Engine) listNewer(r *replica, q wire.Request) {
	a, try := e.attach, e.attach.try
	e.call(r, &q, func(rep *wire.Reply) {
		if e.attach != a || a.try != try || a.phase != attachList {
			return
		}
		if rep.Status != status.OK {
			e.attachFailed(r, rep)
			return
		}
		for _, en := range rep.Entries {
			k := blockKey{en.Chunk, en.Layer, en.Block}
			a.has[r][k] = en.Version
			if b, ok := a.best[k]; !ok || en.Version > b.entry.Version {
				a.best[k] = held{en, r}
			}
		}
		if n := len(rep.Entries); n > 0 && rep.Flags&wire.FlagMore != 0 {
			last := rep.Entries[n-1]
			next := wire.Request{Kind: wire.Newer, Version: a.floor, Chunk: last.Chunk, Layer: last.Layer, Block: last.Block + 1}
			e.listNewer(r, next)
			return
		}
		if a.pending--; a.pending == 0 {
			e.listed()
		}
	})
}

// listed finds the blocks that are not the same everywhere and copies them.
func (e *Engine) listed() {
	a := e.attach
	a.phase, a.queue = attachCopy, nil
	byID := map[ids.ChunkID]*chunk{}
	for _, c := range e.chunks {
		byID[c.id] = c
	}
	for k, b := range a.best {
		c := byID[k.chunk]
		if c != nil && len(e.lacking(c, k, b)) > 0 {
			a.queue = append(a.queue, k)
		}
	}
	sortKeys(a.queue)
	e.copyNext(byID)
}

// lacking lists the chunk's members that hold less than the best of a block.
func (e *Engine) lacking(c *chunk, k blockKey, b held) []*replica {
	var out []*replica
	for _, r := range c.replicas {
		if has, ok := e.attach.has[r]; ok && has[k] < b.entry.Version {
			out = append(out, r)
		}
	}
	return out
}

// copyNext keeps copyWindow blocks on their way; then the members are equal.
func (e *Engine) copyNext(byID map[ids.ChunkID]*chunk) {
	a := e.attach
	for a.pending < copyWindow && len(a.queue) > 0 {
		k := a.queue[0]
		a.queue = a.queue[1:]
		a.pending++
		e.copyBlock(byID, k, a.best[k])
	}
	if a.pending == 0 && len(a.queue) == 0 {
		e.flushAttach()
	}
}

func (e *Engine) copyBlock(byID map[ids.ChunkID]*chunk, k blockKey, b held) {
	a, try := e.attach, e.attach.try
	targets := e.lacking(byID[k.chunk], k, b)
	left := len(targets)
	install := func(data []byte) {
		for _, r := range targets {
			q := &wire.Request{Kind: wire.Install, Chunk: k.chunk, Limit: ids.MakeVersion(e.epoch, 0), Entries: []wire.Entry{b.entry}, Data: data}
			e.call(r, q, func(rep *wire.Reply) {
				if e.attach != a || a.try != try || a.phase != attachCopy {
					return
				}
				if rep.Status != status.OK {
					e.attachFailed(r, rep)
					return
				}
				if left--; left == 0 {
					a.pending--
					e.copyNext(byID)
				}
			})
		}
	}
	if b.entry.Kind != wire.EntryData {
		install(nil)
		return
	}
	q := &wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Chunk: k.chunk, Layer: k.layer, Block: k.block, Count: 1}
	e.call(b.by, q, func(rep *wire.Reply) {
		if e.attach != a || a.try != try || a.phase != attachCopy {
			return
		}
		if rep.Status == status.OK && (len(rep.Entries) != 1 || len(rep.Data) != ids.BlockSize || rep.Entries[0].Version != b.entry.Version ||
			!e.entriesMatch(k.chunk, rep.Entries, rep.Data)) {
			rep = &wire.Reply{Kind: wire.Read, Status: status.Corrupt, Detail: "a block written since the floor does not match its checksum"}
		}
		if rep.Status != status.OK {
			e.attachFailed(b.by, rep)
			return
		}
		install(rep.Data)
	})
}

// flushAttach makes the equal state durable and tells every member so.
func (e *Engine) flushAttach() {
	a := e.attach
	a.phase, a.pending = attachFlush, 0
	try := a.try
	floor := ids.MakeVersion(e.epoch, 0)
	for r := range a.has {
		a.pending++
		e.call(r, &wire.Request{Kind: wire.Settle, Floor: floor}, func(rep *wire.Reply) {
			if e.attach != a || a.try != try || a.phase != attachFlush {
				return
			}
			if rep.Status != status.OK {
				e.attachFailed(r, rep)
				return
			}
			r.intact = true
			if a.pending--; a.pending == 0 {
				e.serve(floor)
			}
		})
	}
	if a.pending == 0 {
		e.serve(floor)
	}
}

// serve admits what has waited.
func (e *Engine) serve(floor ids.Version) {
	e.floor = max(e.floor, floor)
	e.state, e.why, e.attach = Serving, "", nil
	e.flush.lastAt = e.now
	for _, r := range e.replicas {
		if r.inSync && r.up && r.sealed {
			e.resume(r)
		}
	}
	e.admitAll(e.waiting.takeAll())
}
