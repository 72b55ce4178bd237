package volume

import (
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

// pacer says how fast background copies (joins and new copies) go: as fast as
// the guest does not feel. While nothing is copied it learns how long the guest's
// operations take; while something is, their growing longer halves the rate, and
// their not doing so raises it a little (the rule of LEDBAT, RFC 6817: delay, not
// loss, says that somebody else wants the road). A guest without operations
// leaves everything to the copies.
//
//	paceFloor ≤ rate ≤ max;  −1 run ≤ tokens ≤ rate × paceWindow
type pacer struct {
	max, rate float64 // bytes per second
	tokens    float64 // bytes
	filledAt  time.Duration
	windowAt  time.Duration
	ops       int           // of the guest in this window
	took      time.Duration // theirs, together
	copied    int           // bytes in this window
	base      time.Duration // an operation's usual time without copies; 0: not known
	held      []*transfer   // wait for tokens
}

const (
	paceFloor  = 4 << 20 // bytes per second: a copy ends, whatever the guest does
	paceFirst  = 32 << 20
	paceWindow = 100 * time.Millisecond
	paceSlack  = 200 * time.Microsecond // what an operation may take longer in any case
)

func (p *pacer) init(now time.Duration, most int64) {
	p.max = max(float64(most), paceFloor)
	p.rate, p.filledAt, p.windowAt = min(paceFirst, p.max), now, now
}

// guest notes an operation that was answered.
func (p *pacer) guest(took time.Duration) {
	p.ops++
	p.took += took
}

// turn ends a window and sets the rate of the next.
func (p *pacer) turn(now time.Duration) {
	if now-p.windowAt < paceWindow {
		return
	}
	mean := time.Duration(0)
	if p.ops > 0 {
		mean = p.took / time.Duration(p.ops)
	}
	switch {
	case p.ops == 0:
		p.rate = min(p.rate*2, p.max)
	case p.copied == 0 && p.base == 0:
		p.base = mean
	case p.copied == 0:
		p.base += (mean - p.base) / 8
	case p.base == 0 || mean <= p.base*3/2+paceSlack:
		p.rate = min(p.rate*1.25, p.max)
	default:
		p.rate = max(p.rate/2, paceFloor)
		p.base += (mean - p.base) / 64 // the guest itself may have changed
	}
	p.windowAt, p.ops, p.took, p.copied = now, 0, 0, 0
}

// take reports whether a run of so many bytes may go now. It may overdraw by one
// run, so that a run longer than a window's share goes too.
func (p *pacer) take(now time.Duration, n int) bool {
	p.turn(now)
	p.tokens = min(p.tokens+p.rate*(now-p.filledAt).Seconds(), p.rate*paceWindow.Seconds())
	p.filledAt = now
	if p.tokens < 0 {
		return false
	}
	p.tokens -= float64(n)
	p.copied += n
	return true
}

// mayCopy asks for a run of a background transfer; one that must wait is held
// until resumeCopies.
func (e *Engine) mayCopy(t *transfer, blocks int) bool {
	n := blocks * ids.BlockSize
	if !t.held && e.pace.take(e.now, n) && (e.cfg.Budget == nil || e.cfg.Budget.Take(e.now, n)) {
		return true
	}
	if !t.held {
		t.held = true
		e.pace.held = append(e.pace.held, t)
	}
	return false
}

// resumeCopies lets held transfers go on, the longest waiting first.
func (e *Engine) resumeCopies() {
	e.pace.turn(e.now)
	held := e.pace.held
	e.pace.held = nil
	for i, t := range held {
		if t.held = false; t.over || !t.live() {
			continue
		}
		e.runTransfer(t)
		if t.held { // the others would find nothing either
			for _, o := range held[i+1:] {
				o.held = true
			}
			e.pace.held = slices.Concat(held[i+1:], e.pace.held)
			return
		}
	}
}
