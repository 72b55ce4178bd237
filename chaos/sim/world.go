package sim

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"
)

// world is the whole cluster and the one queue that moves it. Everything in it
// runs on the caller's goroutine; the production cores below it have none of
// their own, so that the order of events is the seed's alone.
type world struct {
	cfg    Config
	rng    *rand.Rand // latencies and choices of the machinery
	now    time.Duration
	queue  eventHeap
	pushed uint64 // orders events of the same time
	step   uint64 // logical time: rises with every invocation and answer
	hash   uint64
	stats  Stats
	traces []Line // nil unless traced
	failed *Failure

	shape  shape
	nodes  []*node
	gates  []*gateway
	meta   *meta
	boss   *controller
	check  *checker
	load   *load
	faults *injector
	clones []*clone
}

// maxEvents bounds the events per client operation of a run; a usual one has 10
// to 40.
const maxEvents = 2000

// event is something that happens at a time.
type event struct {
	at  time.Duration
	seq uint64
	do  func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*h = old[:len(old)-1]
	return e
}

// after lets f happen d from now.
func (w *world) after(d time.Duration, f func()) {
	w.pushed++
	heap.Push(&w.queue, event{w.now + max(d, 0), w.pushed, f})
}

// runUntil lets events happen until ok says so, or until the world's time has
// passed limit, or something has failed; it reports whether ok said so.
func (w *world) runUntil(limit time.Duration, ok func() bool) bool {
	for w.failed == nil {
		if ok() {
			return true
		}
		if len(w.queue) == 0 || w.queue[0].at > limit {
			return false
		}
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		if w.stats.Events++; w.stats.Events > maxEvents*uint64(w.cfg.Steps) {
			w.violate("P7", "%d events for %d operations: something goes round in circles; %s", w.stats.Events, w.load.begun, w.picture())
		}
		e.do()
	}
	return false
}

// tick gives the next logical time.
func (w *world) tick() uint64 {
	w.step++
	return w.step
}

// span draws a duration, evenly in [lo, hi).
func (w *world) span(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)))
}

// chance is true once in n.
func (w *world) chance(n int) bool { return w.rng.IntN(n) == 0 }

// note enters what happened into the state hash, and into the trace if there is
// one. text is made only then.
func (w *world) note(who, what string, text func() string, facts ...uint64) {
	w.mix(uint64(w.now))
	for _, s := range [...]string{who, what} {
		for i := 0; i < len(s); i++ {
			w.hash = (w.hash ^ uint64(s[i])) * 0x100000001b3 // FNV-1a, Fowler, Noll and Vo
		}
	}
	for _, f := range facts {
		w.mix(f)
	}
	if w.traces != nil {
		w.traces = append(w.traces, Line{At: w.now, Who: who, What: what, Text: text()})
	}
}

func (w *world) mix(x uint64) {
	w.hash = (w.hash ^ x) * 0x9e3779b97f4a7c15
	w.hash ^= w.hash >> 29
}

// violate stops the run: a promise is broken.
func (w *world) violate(promise, format string, args ...any) {
	if w.failed == nil {
		w.failed = &Failure{Promise: promise, At: w.now, Text: fmt.Sprintf(format, args...)}
		w.note("checker", promise, func() string { return w.failed.Text })
	}
}
