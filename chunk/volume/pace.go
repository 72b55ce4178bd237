package volume

import (
	"math/bits"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

// pacer says how fast background copies (joins and new copies) go: as fast as
// the guest does not feel. What a guest feels is its slowest operations, and
// those grow long before the mean does. So the pacer learns, while nothing is
// copied, the time that only every hundredth operation exceeds; while something
// is, it counts the operations that take a quarter longer, and owes the guest
// those that are more than one in a hundred. While it owes nothing the rate rises a
// little; when it owes some, it is halved. From time to time copies rest, so that
// what is usual is learned anew.
//
// A rate alone is not enough: a store that is given a MiB in one piece answers
// nobody else meanwhile. While the guest is active copies go in small pieces, few
// at once, each when the one before is through. A guest that asks for nothing
// leaves everything to the copies.
//
//	paceFloor ≤ rate ≤ max;  flying = runs sent and not answered
type pacer struct {
	max, rate float64 // bytes per second; rate: while the guest is active
	tokens    float64 // bytes; overdrawn by one run at most
	filledAt  time.Duration
	flying    int
	held      []*transfer // wait for their turn

	windowAt  time.Duration
	activeAt  time.Duration // the guest's last answer; < 0: none
	ops, slow int           // of the guest in this window; slow: longer than limit
	owed      float64       // slow operations beyond one in a hundred since the rate was halved; ≥ −paceOwed
	copied    int           // bytes in this window
	quiet     int           // windows without copies, in a row
	copying   int           // windows with copies since the last rest
	resting   int           // windows of the rest that are left
	usual     tail          // what operations take without copies
	limit     time.Duration // 0: not known
}

const (
	paceFloor  = 16 << 20 // bytes per second, whatever the guest does: a TiB without its second copy for 18 hours is enough
	paceFirst  = 32 << 20
	paceWindow = 100 * time.Millisecond
	paceActive = time.Second            // a guest is active for so long after an answer
	paceSlack  = 500 * time.Microsecond // what an operation may take longer in any case
	paceSample = 100                    // operations, before anything is said of the slowest of a hundred
	paceOwed   = 2                      // operations, before the rate is halved

	// While the guest is active:
	pieceBlocks = 16 // of a run: 64 KiB
	flyMax      = 2  // pieces at once
	restEvery   = 50 // windows
	restFor     = 3  // windows; the first still feels the copies before it
)

func (p *pacer) init(now time.Duration, most int64) {
	p.max = max(float64(most), paceFloor)
	p.rate, p.filledAt, p.windowAt, p.activeAt = min(paceFirst, p.max), now, now, -1
	p.copying = restEvery // nothing is known: rest first

}

// guest notes an operation that was answered.
func (p *pacer) guest(now, took time.Duration) {
	p.turn(now)
	p.activeAt = now
	p.ops++
	if p.limit > 0 && took > p.limit {
		p.slow++
	}
	if p.quiet > 0 && p.copied == 0 && p.flying == 0 {
		p.usual.add(took)
	}
}

// active reports whether copies have to care for the guest.
func (p *pacer) active(now time.Duration) bool { return p.activeAt >= 0 && now-p.activeAt < paceActive }

// turn ends a window and sets the rate of the next.
func (p *pacer) turn(now time.Duration) {
	if now-p.windowAt < paceWindow {
		return
	}
	did := float64(p.copied) / (now - p.windowAt).Seconds()
	switch {
	case p.copied == 0 && p.flying == 0:
		p.quiet++
		if p.usual.count >= paceSample {
			usual := p.usual.exceededBy(100)
			p.limit = usual + max(usual/4, paceSlack)
		}
	case p.limit > 0:
		p.owed = max(p.owed+float64(p.slow)-float64(p.ops)/100, -paceOwed)
		if p.owed > paceOwed {
			p.rate, p.owed = max(min(p.rate, did)/2, paceFloor), 0
		} else if p.owed <= 0 && did >= p.rate/2 { // else it is not the pacer that holds them
			p.rate = min(p.rate*1.125, p.max)
		}
	}
	if p.copied > 0 {
		p.quiet = 0
		p.copying++
	}
	if p.resting > 0 {
		p.resting--
	} else if p.ops > 0 && p.copying >= restEvery {
		p.resting, p.copying = restFor, 0
	}
	p.windowAt, p.ops, p.slow, p.copied = now, 0, 0, 0
}

// piece is how many of n blocks may be copied at once.
func (p *pacer) piece(now time.Duration, n int) int {
	if p.active(now) {
		return min(n, pieceBlocks)
	}
	return n
}

// take reports whether a run of so many bytes may go now. It may overdraw by one
// run, so that a run longer than a window's share goes too.
func (p *pacer) take(now time.Duration, n int) bool {
	p.turn(now)
	rate := p.max
	if p.active(now) {
		if rate = p.rate; p.flying >= flyMax || p.resting > 0 {
			return false
		}
	}
	p.tokens = min(p.tokens+rate*(now-p.filledAt).Seconds(), rate*paceWindow.Seconds())
	p.filledAt = now
	if p.tokens < 0 {
		return false
	}
	p.tokens -= float64(n)
	p.copied += n
	return true
}

// tail is how long operations take: a histogram of four classes an octave, from a
// microsecond on. What is old counts less and less.
type tail struct {
	classes [4 * tailOctaves]uint32
	count   uint32 // sum of classes ≤ tailMost
}

const (
	tailOctaves = 32
	tailMost    = 8000
)

func (t *tail) add(d time.Duration) {
	us := max(uint64(d/time.Microsecond), 1) << 2
	octave := bits.Len64(us) - 3
	t.classes[min(4*octave+int(us>>octave&3), len(t.classes)-1)]++
	if t.count++; t.count < tailMost {
		return
	}
	t.count = 0
	for i := range t.classes {
		t.classes[i] /= 2
		t.count += t.classes[i]
	}
}

// exceededBy is a time that at most one of n operations exceeds.
func (t *tail) exceededBy(n uint32) time.Duration {
	i, over := len(t.classes)-1, uint32(0)
	for ; i > 0 && (over+t.classes[i])*n <= t.count; i-- {
		over += t.classes[i]
	}
	octave := i / 4
	return time.Duration(5+i%4) << octave >> 2 * time.Microsecond
}

// mayCopy asks for a run of a background transfer; one that must wait is held
// until resumeCopies.
func (e *Engine) mayCopy(t *transfer, blocks int) bool {
	n := blocks * ids.BlockSize
	if !t.held && e.pace.take(e.now, n) && (e.cfg.Budget == nil || e.cfg.Budget.Take(e.now, n)) {
		e.pace.flying++
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
	if len(e.pace.held) == 0 {
		return
	}
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
