package volume

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// transfer gives replicas the state that others have of some blocks: what
// reconciliation and join have in common. Each entry says the state a block had
// at its source when it was listed. Data is read in runs; a run with a bad block
// is halved until the bad ones stand alone; a block that is bad at every source
// goes on as poison, so that it is an error everywhere until it is overwritten
// and not an obstacle for ever.
//
//	0 ≤ active ≤ transferWindow
type transfer struct {
	from   []*replica // sources of data, best first
	to     []*replica
	limit  ids.Version // installed below it only; a source's newer state is skipped
	runs   [][]wire.Entry
	active int
	bytes  uint64           // of data, given to each target
	live   func() bool      // whether anybody still waits for this
	hope   func() bool      // whether a good copy may turn up that no source has; may be nil
	ended  func(f *failure) // called once: nil, or why not
	over   bool
	paced  bool // it yields to the guest
	held   bool // it waits for the pacer
}

// failure is a replica's answer that ended a transfer.
type failure struct {
	r   *replica
	rep *wire.Reply
}

const (
	// runBlocks bounds one request of a transfer: 1 MiB of data.
	runBlocks = 256
	// transferWindow bounds a transfer's runs on their way.
	transferWindow = 8
	// sourceTries is how often each source of a bad block is asked: data may
	// also be damaged on its way.
	sourceTries = 2
)

// runs cuts entries (sorted, of one chunk) into runs that one request can read,
// or, without data, install.
func runs(es []wire.Entry) [][]wire.Entry {
	var out [][]wire.Entry
	for len(es) > 0 {
		n := 1
		for n < len(es) && n < runBlocks && sameRun(es[n-1], es[n]) {
			n++
		}
		out = append(out, es[:n:n])
		es = es[n:]
	}
	return out
}

func sameRun(a, b wire.Entry) bool {
	if a.Chunk != b.Chunk || a.Layer != b.Layer || (a.Kind == wire.EntryData) != (b.Kind == wire.EntryData) {
		return false
	}
	return a.Kind != wire.EntryData || b.Block == a.Block+1
}

// runTransfer starts what the window allows, and ends the transfer when nothing is
// left.
func (e *Engine) runTransfer(t *transfer) {
	for !t.over && t.active < transferWindow && len(t.runs) > 0 {
		run := t.runs[0]
		if t.paced {
			n := len(run)
			if run[0].Kind == wire.EntryData {
				n = e.pace.piece(e.now, n)
			}
			if !e.mayCopy(t, n) {
				return
			}
			if n < len(run) {
				run, t.runs[0] = run[:n:n], run[n:]
			} else {
				t.runs = t.runs[1:]
			}
		} else {
			t.runs = t.runs[1:]
		}
		t.active++
		if run[0].Kind == wire.EntryData {
			e.fetch(t, run, 0)
		} else {
			e.give(t, run, nil)
		}
	}
	if !t.over && t.active == 0 && len(t.runs) == 0 {
		t.over = true
		t.ended(nil)
	}
}

// landed ends a run, whatever became of it.
func (e *Engine) landed(t *transfer) {
	t.active--
	if t.paced {
		e.pace.flying--
	}
}

func (e *Engine) failTransfer(t *transfer, r *replica, rep *wire.Reply) {
	if !t.over {
		t.over = true
		t.ended(&failure{r, rep})
	}
}

// fetch reads a run from a source, the next one at each try.
func (e *Engine) fetch(t *transfer, run []wire.Entry, try int) {
	first, n := run[0], len(run)
	s := t.from[try%len(t.from)]
	q := &wire.Request{Kind: wire.Read, Flags: wire.FlagEntries | wire.FlagRaw, Chunk: first.Chunk, Layer: first.Layer, Block: first.Block, Count: uint32(n)}
	e.call(s, q, func(rep *wire.Reply) {
		if t.over || !t.live() {
			t.over = true // it would end well, and without this run
			e.landed(t)
			return
		}
		k := rep.Status
		if k == status.OK && !e.complete(q, run, rep) {
			k = status.Corrupt
		}
		switch {
		case k == status.OK:
			e.giveRead(t, run, rep)
		case k != status.Corrupt && k != status.Poison:
			e.landed(t)
			e.failTransfer(t, s, rep)
		case n > 1:
			e.landed(t)
			t.runs = append(t.runs, run[:n/2:n/2], run[n/2:])
			e.runTransfer(t)
		case try+1 < sourceTries*len(t.from):
			e.fetch(t, run, try+1)
		case t.hope != nil && t.hope():
			e.landed(t)
			e.failTransfer(t, s, &wire.Reply{Kind: wire.Read, Status: status.Corrupt, Detail: "a bad block, and who may have a good copy cannot be asked now"})
		default:
			first.Kind, first.Sum = wire.EntryPoison, 0
			e.give(t, []wire.Entry{first}, nil)
		}
	})
}

// complete reports whether a source's answer has every block, not older than
// listed and matching its checksum.
func (e *Engine) complete(q *wire.Request, run []wire.Entry, rep *wire.Reply) bool {
	if len(rep.Entries) != len(run) || len(rep.Data) != len(run)*ids.BlockSize ||
		!entriesMatch(e.volume, q, rep.Entries, rep.Data) {
		return false
	}
	for i := range run {
		if rep.Entries[i].Version < run[i].Version {
			return false
		}
	}
	return true
}

// giveRead installs what a source answered, but for blocks overwritten meanwhile:
// the targets get such a write themselves.
func (e *Engine) giveRead(t *transfer, run []wire.Entry, rep *wire.Reply) {
	es := make([]wire.Entry, 0, len(run))
	data := make([]byte, 0, len(rep.Data))
	for i, en := range rep.Entries {
		if en.Version >= t.limit {
			continue
		}
		es = append(es, en)
		if en.Kind == wire.EntryData {
			data = append(data, rep.Data[i*ids.BlockSize:(i+1)*ids.BlockSize]...)
		}
	}
	e.give(t, es, data)
}

// give installs states in every target and goes on when all have them.
func (e *Engine) give(t *transfer, es []wire.Entry, data []byte) {
	landed := func() {
		e.landed(t)
		t.bytes += uint64(len(data))
		e.runTransfer(t)
	}
	if len(es) == 0 {
		landed()
		return
	}
	left := len(t.to)
	for _, r := range t.to {
		q := &wire.Request{Kind: wire.Install, Chunk: es[0].Chunk, Layer: es[0].Layer, Limit: t.limit, Entries: es, Data: data}
		e.call(r, q, func(rep *wire.Reply) {
			left--
			switch {
			case t.over || !t.live():
				t.over = true
			case rep.Status != status.OK:
				e.failTransfer(t, r, rep)
			case left == 0:
				landed()
				return
			}
			if left == 0 {
				e.landed(t)
			}
		})
	}
}
