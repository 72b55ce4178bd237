package volume

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

// paced is a pacer in a world of its own: a guest that does something every
// millisecond, and copies that want all they can get and take a millisecond a
// piece.
type paced struct {
	pacer
	t      *testing.T
	now    time.Duration
	window []int // bytes copied in each of the last milliseconds
}

func newPaced(t *testing.T) *paced {
	p := &paced{t: t}
	p.init(0, 256<<20)
	return p
}

// run lets time pass and returns the bytes copied. took says how long the guest's
// n-th operation takes, after so many bytes were copied in the 100 ms before it; 0:
// there is none. copies: somebody wants to copy.
func (p *paced) run(span time.Duration, copies bool, took func(n, copied int) time.Duration) (bytes int) {
	const run = 256 // blocks
	for end := p.now + span; p.now < end; p.now += time.Millisecond {
		recent := 0
		for _, n := range p.window {
			recent += n
		}
		if d := took(int(p.now/time.Millisecond), recent); d > 0 {
			p.guest(p.now, d)
		}
		n := 0
		p.flying = 0
		for copies {
			blocks := p.piece(p.now, run)
			if p.flying == transferWindow || !p.take(p.now, blocks*ids.BlockSize) {
				break
			}
			p.flying++
			n += blocks * ids.BlockSize
			if p.active(p.now) && (blocks > pieceBlocks || p.flying > flyMax) {
				p.t.Fatalf("%d blocks at once, %d pieces, while the guest is active", blocks, p.flying)
			}
		}
		bytes += n
		if p.window = append(p.window, n); len(p.window) > 100 {
			p.window = p.window[1:]
		}
	}
	return bytes
}

// A guest without operations leaves everything to copies, and so does one that
// feels nothing, but for their small pieces and the rests.
func TestCopiesTakeWhatTheGuestLeaves(t *testing.T) {
	idle := newPaced(t)
	if got := idle.run(10*time.Second, true, func(int, int) time.Duration { return 0 }); got < 2400<<20 {
		t.Errorf("an idle guest leaves %d MiB in 10 s of 2,560", got>>20)
	}
	calm := newPaced(t)
	if got := calm.run(20*time.Second, true, func(int, int) time.Duration { return time.Millisecond }); got < 1200<<20 {
		t.Errorf("a guest that feels nothing leaves %d MiB in 20 s, of at most 2,500", got>>20)
	}
}

// Copies yield to the slowest operations: here one in twenty, or in 67, is slow once
// 4 MiB are copied in 100 ms, of which the mean tells nothing. The rate settles there,
// with one in a hundred slow at most.
func TestCopiesYieldToTheSlowest(t *testing.T) {
	for _, oneIn := range []int{20, 67} {
		usual := func(n, _ int) time.Duration {
			if n%200 == 0 {
				return 8 * time.Millisecond
			}
			return 4 * time.Millisecond
		}
		felt := func(n, copied int) time.Duration {
			if copied > 4<<20 && n%oneIn == 1 {
				return 20 * time.Millisecond
			}
			return usual(n, copied)
		}
		p := newPaced(t)
		p.run(2*time.Second, false, usual)
		p.run(5*time.Second, true, felt) // it finds its rate
		slow := 0
		got := p.run(30*time.Second, true, func(n, copied int) time.Duration {
			d := felt(n, copied)
			if d > 8*time.Millisecond {
				slow++
			}
			return d
		})
		if slow > 30_000/100 {
			t.Errorf("%d of 30,000 operations are slow, when one in %d may be", slow, oneIn)
		}
		if got < 30*20<<20 || got > 30*50<<20 {
			t.Errorf("%d MiB in 30 s, when one in %d may be slow: 40 MiB per second hurt nobody", got>>20, oneIn)
		}
	}
}

// Whatever the guest does, a copy ends; and what is usual is learned anew, so that
// a guest that has become slow by itself does not hold copies down for ever.
func TestCopiesAlwaysGoOn(t *testing.T) {
	p := newPaced(t)
	p.run(2*time.Second, false, func(int, int) time.Duration { return time.Millisecond })
	got := p.run(10*time.Second, true, func(_, copied int) time.Duration {
		if copied > 0 {
			return 50 * time.Millisecond
		}
		return time.Millisecond
	})
	if got < 8*paceFloor {
		t.Errorf("%d MiB in 10 s, less than the floor", got>>20)
	}
	if got = p.run(60*time.Second, true, func(int, int) time.Duration { return 20 * time.Millisecond }); got < 60*24<<20 {
		t.Errorf("a guest that is slower now, copies or not, leaves %d MiB in 60 s", got>>20)
	}
}

// The histogram says what it was told, to a quarter of an octave.
func TestTail(t *testing.T) {
	var h tail
	for i := range 20000 {
		h.add(time.Duration(i%1000+1) * 10 * time.Microsecond)
	}
	if got := h.exceededBy(100); got < 9900*time.Microsecond || got > 12500*time.Microsecond {
		t.Errorf("of 10 µs to 10 ms one in a hundred exceeds %v", got)
	}
	if got := (&tail{}).exceededBy(100); got > 2*time.Microsecond {
		t.Errorf("of nothing: %v", got)
	}
}

// A replica that answers, and ten times later than its peers for ten seconds, is
// excluded; one that only is a little slower is not.
func TestAReplicaTooSlowIsExcluded(t *testing.T) {
	for _, c := range []struct {
		took time.Duration
		out  bool
	}{{500 * time.Millisecond, true}, {40 * time.Millisecond, false}} {
		w := filled(t, 1, 4)
		w.until("idle", w.idle)
		for range 12 {
			for _, r := range w.e.replicas {
				took := 2 * time.Millisecond
				if r.index == 2 {
					took = c.took
				}
				for range lagSamples {
					r.pulse.add(took)
				}
			}
			w.e.out, w.e.now = &w.out, w.e.now+lagWindow
			w.now = max(w.now, w.e.now)
			w.e.watchLag()
		}
		if r := w.e.replicas[2]; r.excluding != c.out {
			t.Errorf("answers in %v: excluding %v", c.took, r.excluding)
		}
	}
}
