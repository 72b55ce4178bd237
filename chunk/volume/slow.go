package volume

import (
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// leg is one replica's part of a request.
type leg struct {
	sent   time.Duration // engine time of the send; 0: not asked
	timeUs uint32        // from there to the answer, at least 1; 0: not answered
	tookUs uint32        // of that, inside the store's server
}

type legs [maxReplicas]leg

// answered notes an answer. The time of a store in this process is all its own.
func (l *leg) answered(d time.Duration, tookUs uint64, local bool) {
	l.timeUs = uint32(min(max(d.Microseconds(), 1), 1<<32-1))
	l.tookUs = uint32(min(tookUs, uint64(l.timeUs)))
	if local {
		l.tookUs = l.timeUs
	}
}

// cause is what an operation's end has waited for: the piece, or the flush
// round, that came last. At most one of legs and round is set.
type cause struct {
	legs     *legs // by position in replicas
	round    []leg
	replicas []*replica
}

// Leg is what one replica did of a slow operation.
type Leg struct {
	Replica  int           // index of the member
	Answered bool          // false: the operation ended without it
	Time     time.Duration // from the request's send to its answer, or to the operation's end
	Store    time.Duration // of that, in the store's server: its queue and its disk; the rest is the network
}

// Slow is a finished operation and where its time went:
//
//	Total = Waited + Before + After + the time of the slowest answer between
type Slow struct {
	Kind   OpKind
	FUA    bool
	Off    uint64 // bytes
	Len    uint64 // bytes
	Status status.Kind
	Ended  time.Duration // engine time
	Total  time.Duration
	Waited time.Duration // with the shell, before it was submitted
	Before time.Duration // from there until a replica was asked: attach, chunk allocation, earlier writes on its blocks, the flush before
	After  time.Duration // from the last answer to its end: a commit, a lease, a write in flight that a read may have seen
	Legs   []Leg
}

// The bounds of the log of slow operations.
const (
	slowMax    = 32               // operations kept of each window
	slowWindow = 60 * time.Second // two windows are kept: the slowest of the last minute or two
)

// slowEntry is a Slow without memory of its own.
type slowEntry struct {
	s    Slow
	legs [maxReplicas]Leg
	n    int
}

// slowLog keeps the slowest operations of two windows. An operation that is
// not among them costs one comparison.
type slowLog struct {
	since  time.Duration
	least  time.Duration // the shortest kept in a full window, else 0
	now    []slowEntry   // ≤ slowMax
	before []slowEntry   // ≤ slowMax
}

// note keeps a finished operation if it is among the slowest.
func (e *Engine) note(op *Op, k status.Kind) {
	l := &e.slow
	if e.now-l.since >= slowWindow {
		l.since, l.least = e.now, 0
		l.now, l.before = l.before[:0], l.now
	}
	total := op.Waited + e.now - op.at
	if total <= l.least {
		return
	}
	at := len(l.now)
	if at < slowMax {
		l.now = append(l.now, slowEntry{})
	} else {
		at = l.shortest()
	}
	l.now[at].fill(e, op, k, total)
	if len(l.now) == slowMax {
		l.least = l.now[l.shortest()].s.Total
	}
}

func (l *slowLog) shortest() int {
	at := 0
	for i := range l.now {
		if l.now[i].s.Total < l.now[at].s.Total {
			at = i
		}
	}
	return at
}

func (x *slowEntry) fill(e *Engine, op *Op, k status.Kind, total time.Duration) {
	x.s = Slow{Kind: op.Kind, FUA: op.FUA, Off: op.Off, Len: op.Len, Status: k, Ended: e.now, Total: total, Waited: op.Waited}
	x.n = 0
	list := e.cause.round
	if e.cause.legs != nil {
		list = e.cause.legs[:]
	}
	first, last := e.now, op.at // of the sends, of the answers
	for i := range list {
		l := &list[i]
		if l.sent == 0 || i >= len(e.cause.replicas) || x.n == len(x.legs) {
			continue
		}
		g := Leg{Replica: e.cause.replicas[i].index, Answered: l.timeUs != 0, Time: e.now - l.sent}
		if g.Answered {
			g.Time, g.Store = time.Duration(l.timeUs)*time.Microsecond, time.Duration(l.tookUs)*time.Microsecond
			last = max(last, l.sent+g.Time)
		}
		first = min(first, l.sent)
		x.legs[x.n] = g
		x.n++
	}
	first = max(first, op.at) // a flush may ride in a round that had begun
	x.s.Before = first - op.at
	x.s.After = max(0, e.now-max(first, last))
}

// Slowest returns the slowest operations of the last minute or two, the
// slowest first.
func (e *Engine) Slowest() []Slow {
	var out []Slow
	for _, list := range [][]slowEntry{e.slow.now, e.slow.before} {
		for i := range list {
			s := list[i].s
			s.Legs = append([]Leg(nil), list[i].legs[:list[i].n]...)
			out = append(out, s)
		}
	}
	slices.SortStableFunc(out, func(a, b Slow) int { return int(b.Total - a.Total) })
	return out
}
