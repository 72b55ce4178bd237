package volume

import (
	"testing"
	"time"
)

// copied runs a pacer for a while: a guest whose operations take `took` of the
// bytes copied in the window before, and copies that want all they can get.
func copied(p *pacer, from, span time.Duration, took func(window int) time.Duration) (bytes int) {
	const run = 256 << 10
	last, at := 0, from
	for now := from; now < from+span; now += 10 * time.Millisecond {
		if now-at >= paceWindow {
			last, at = 0, now
		}
		for range 20 {
			p.guest(took(last))
		}
		for p.take(now, run) {
			bytes, last = bytes+run, last+run
		}
	}
	return bytes
}

// Copies take all there is while the guest does not feel them, and stay near the
// floor while it does.
func TestCopiesYieldToTheGuest(t *testing.T) {
	const most = 100 << 20
	quiet := &pacer{}
	quiet.init(0, most)
	if got := copied(quiet, 0, 20*time.Second, func(int) time.Duration { return time.Millisecond }); got < 15*most {
		t.Errorf("a guest that feels nothing leaves %d bytes in 20 s of %d per second", got, most)
	}
	slow := &pacer{}
	slow.init(0, most)
	for i := range 20 { // it learns what the guest is used to
		slow.guest(time.Millisecond)
		slow.turn(time.Duration(i) * paceWindow)
	}
	got := copied(slow, 2*time.Second, 20*time.Second, func(window int) time.Duration {
		if window > 1<<20 {
			return 10 * time.Millisecond
		}
		return time.Millisecond
	})
	if got > 20*most/4 || got < 20*paceFloor/2 {
		t.Errorf("a guest that is slowed down leaves %d bytes in 20 s", got)
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
