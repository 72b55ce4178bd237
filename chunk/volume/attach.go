package volume

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// attach is the way from a committed epoch to serving:
//
//	seal → exclude who was not reached → reconcile what was written since the
//	floor → flush → settle → serve
//
// Any failure on the way goes back to seal; nothing was read or written for a
// client yet.
type attach struct {
	phase     attachPhase
	started   time.Duration
	decided   uint64 // the doubt since when members not reached are to go; 0: not yet
	try       int    // tells the answers of this round from those of an earlier one
	pending   int    // answers, or transfers, of the running phase outstanding
	floor     ids.Version
	best      map[blockKey]wire.Entry // the newest state of each block above the floor
	has       map[*replica]map[blockKey]wire.Entry
	transfers []*transfer // not started
	byID      map[ids.ChunkID]*chunk
}

type attachPhase uint8

const (
	attachSeal attachPhase = iota
	attachExclude
	attachList
	attachCopy
	attachFlush
	attachSettle
)

// attachTransfers bounds the transfers under way.
const attachTransfers = 2

type blockKey struct {
	chunk ids.ChunkID
	layer ids.LayerID
	block ids.Block
}

func (e *Engine) beginAttach() {
	e.state = Attaching
	e.alloc.pieces = map[ids.ChunkIndex][]piece{}
	e.attach = &attach{started: e.now}
}

// stepAttach goes as far as it can.
func (e *Engine) stepAttach() {
	a := e.attach
	if a == nil || a.phase != attachSeal || e.metaBusy() {
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
	if why := e.insufficient(len(reached)); why != "" {
		e.why = why
		return
	}
	if (allLost || e.now-a.started >= e.cfg.SealWait) && e.stillThere(reached) {
		a.phase, a.decided = attachExclude, 0
		e.commitExclusion(unreached)
	}
}

// stillThere reports whether all that were reached have given a sign of life
// since it was decided to go on with them alone (see mayPropose). One that does
// not loses its link, and the decision is made anew.
func (e *Engine) stillThere(reached []*replica) bool {
	a := e.attach
	if a.decided == 0 {
		a.decided = e.newDoubt()
	}
	all := true
	for _, r := range reached {
		if !e.lives(r, a.decided) {
			e.ping(r)
			all = false
		}
	}
	return all
}

// insufficient says why the sealed members are not enough: every chunk needs
// one that has everything acknowledged — one that lost nothing since the
// floor, or all of its in-sync members together.
func (e *Engine) insufficient(reached int) string {
	if reached == 0 {
		return "waiting for a member: none can be reached"
	}
	for _, c := range e.sortedChunks() {
		whole, all := false, true
		for pos, r := range c.replicas {
			if c.fills[pos] != nil {
				continue
			}
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
	a.best, a.has, a.floor, a.transfers = map[blockKey]wire.Entry{}, map[*replica]map[blockKey]wire.Entry{}, 0, nil
	for _, r := range members {
		a.floor = max(a.floor, r.floor)
	}
	a.byID = map[ids.ChunkID]*chunk{}
	for _, c := range e.chunks {
		a.byID[c.id] = c
	}
	for _, r := range members {
		a.has[r] = map[blockKey]wire.Entry{}
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
			if c := a.byID[en.Chunk]; c == nil || !c.heldBy(r) {
				continue // a copy that was never finished, or has moved away
			}
			k := blockKey{en.Chunk, en.Layer, en.Block}
			a.has[r][k] = en
			if b, ok := a.best[k]; !ok || better(en, b) {
				a.best[k] = en
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

// better reports whether a is to be kept rather than b: the newer one, and of the
// same write the one that can still be read.
func better(a, b wire.Entry) bool {
	return a.Version > b.Version || a.Version == b.Version && b.Kind == wire.EntryPoison && a.Kind != wire.EntryPoison
}

// listed finds the blocks that are not the same everywhere and copies them, in
// one transfer for those of a chunk that the same members have and lack.
func (e *Engine) listed() {
	a := e.attach
	a.phase = attachCopy
	keys := make([]blockKey, 0, len(a.best))
	for k := range a.best {
		keys = append(keys, k)
	}
	sortKeys(keys)
	type group struct {
		chunk      ids.ChunkID
		have, lack uint16
	}
	lists := map[group][]wire.Entry{}
	var order []group
	for _, k := range keys {
		c := a.byID[k.chunk]
		g := group{chunk: k.chunk}
		if g.have, g.lack = e.holders(c, k); g.lack == 0 {
			continue
		}
		if lists[g] == nil {
			order = append(order, g)
		}
		lists[g] = append(lists[g], a.best[k])
	}
	for _, g := range order {
		a.transfers = append(a.transfers, e.attachTransfer(a.byID[g.chunk], g.have, g.lack, lists[g]))
	}
	e.nextTransfers()
}

// holders says which positions of a chunk hold the best state of a block and
// which hold less.
func (e *Engine) holders(c *chunk, k blockKey) (have, lack uint16) {
	a := e.attach
	for pos, r := range c.replicas {
		if a.has[r] == nil || c.fills[pos] != nil {
			continue
		}
		if en := a.has[r][k]; better(a.best[k], en) {
			lack |= 1 << pos
		} else {
			have |= 1 << pos
		}
	}
	return have, lack
}

func (e *Engine) attachTransfer(c *chunk, have, lack uint16, es []wire.Entry) *transfer {
	a, try := e.attach, e.attach.try
	t := &transfer{limit: ids.MakeVersion(e.epoch, 0), runs: runs(es),
		live: func() bool { return e.attach == a && a.try == try && a.phase == attachCopy }}
	for pos, r := range c.replicas {
		if have&(1<<pos) != 0 {
			t.from = append(t.from, r)
		} else if lack&(1<<pos) != 0 {
			t.to = append(t.to, r)
		}
	}
	t.ended = func(f *failure) {
		if f != nil && f.rep.Kind == wire.Read && f.rep.Status == status.NotFound && len(e.layers.chain) > 0 {
			a.phase = attachSeal // a layer went after it was listed
			return
		}
		if f != nil {
			e.attachFailed(f.r, f.rep)
			return
		}
		a.pending--
		e.nextTransfers()
	}
	return t
}

// nextTransfers keeps attachTransfers going; then the members are equal.
func (e *Engine) nextTransfers() {
	a := e.attach
	for a.phase == attachCopy && a.pending < attachTransfers && len(a.transfers) > 0 {
		t := a.transfers[0]
		a.transfers = a.transfers[1:]
		a.pending++
		e.runTransfer(t)
	}
	if a.phase == attachCopy && a.pending == 0 && len(a.transfers) == 0 {
		e.flushAttach()
	}
}

// flushAttach makes the equal state durable everywhere, and only then tells the
// members so: a floor that one of them logged before all are durable would hide
// from the next attach what the others lack.
func (e *Engine) flushAttach() {
	e.attach.phase = attachFlush
	e.askAll(wire.Request{Kind: wire.Flush, Floor: e.attach.floor}, attachFlush, func() {
		floor := ids.MakeVersion(e.epoch, 0)
		e.attach.phase = attachSettle
		e.askAll(wire.Request{Kind: wire.Settle, Floor: floor}, attachSettle, func() { e.serve(floor) })
	})
}

// askAll asks every member the same and goes on when all have answered OK.
func (e *Engine) askAll(q wire.Request, phase attachPhase, then func()) {
	a, try := e.attach, e.attach.try
	a.pending = len(a.has)
	if a.pending == 0 {
		then()
		return
	}
	for _, r := range e.replicas {
		if a.has[r] == nil {
			continue
		}
		e.call(r, &wire.Request{Kind: q.Kind, Floor: q.Floor}, func(rep *wire.Reply) {
			if e.attach != a || a.try != try || a.phase != phase {
				return
			}
			if rep.Status != status.OK {
				e.attachFailed(r, rep)
				return
			}
			r.intact = r.intact || q.Kind == wire.Settle
			if a.pending--; a.pending == 0 {
				then()
			}
		})
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

func sortKeys(ks []blockKey) {
	slices.SortFunc(ks, func(a, b blockKey) int {
		return cmp.Or(cmp.Compare(a.chunk, b.chunk), cmp.Compare(a.layer, b.layer), cmp.Compare(a.block, b.block))
	})
}
