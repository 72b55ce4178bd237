package volume

import (
	"fmt"
	"time"
)

// A replica that answers, and much later than its peers, slows every write down
// and is never silent: it is excluded when it has been too slow for lagWindows
// windows in a row, while the others would do without it.
const (
	lagWindow  = time.Second
	lagWindows = 10
	lagSamples = 16                    // answers of a replica in a window that say anything
	lagFactor  = 8                     // times as long as the fastest peer
	lagLeast   = 50 * time.Millisecond // and at least so long
	lagRest    = time.Minute           // before it may join again
)

// pulse is what a replica's answers to writes took in this window.
type pulse struct {
	n    int
	took time.Duration
	slow int // windows in a row in which it was too slow
}

func (p *pulse) add(d time.Duration) {
	p.n++
	p.took += d
}

// lagState is when the window began.
type lagState struct{ at time.Duration }

// watchLag judges the window that is over.
func (e *Engine) watchLag() {
	if e.now-e.lag.at < lagWindow {
		return
	}
	e.lag.at = e.now
	best := time.Duration(-1)
	for _, r := range e.replicas {
		if r.readable() && r.pulse.n >= lagSamples {
			if mean := r.pulse.took / time.Duration(r.pulse.n); best < 0 || mean < best {
				best = mean
			}
		}
	}
	for _, r := range e.replicas {
		p := r.pulse
		r.pulse = pulse{slow: p.slow}
		switch {
		case !r.readable():
			r.pulse.slow = 0
		case p.n < lagSamples: // says nothing
		case p.took/time.Duration(p.n) < max(best*lagFactor, lagLeast):
			r.pulse.slow = 0
		default:
			r.pulse.slow++
		}
		if r.pulse.slow >= lagWindows && e.state == Serving && e.mayExclude([]*replica{r}) {
			r.pulse.slow = 0
			r.joinAfter = e.now + lagRest
			e.exclude(r, fmt.Sprintf("its writes take %v, those of the fastest %v", p.took/time.Duration(p.n), best))
		}
	}
}
