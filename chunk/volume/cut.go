package volume

import (
	"fmt"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

// The way of a cut, the moment a snapshot shows:
//
//  1. Metadata has prepared the next layer. Until the engine goes over to it
//     nothing writes there, and an attach that comes first goes over by itself:
//     so nothing here has to wait for metadata.
//  2. hold: new writes wait; reads and flushes go on.
//  3. drain: the writes before are acknowledged.
//  4. flush: and durable on every member in sync. From here on the old top never
//     changes, and whoever joins gets all of it.
//  5. go over: the next layer is the top. Held is told.
//  6. release: the writes that waited go on, in the new top. If the cut was held
//     until then, all volumes that were held meanwhile were cut at one moment.
//
// A cut that takes too long is given up, or released by itself: the shell is told,
// and does not name it.

// CutState is how a cut stands.
type CutState uint8

// The states of a cut.
const (
	CutHeld     CutState = iota // gone over; writes wait for Release
	CutGivenUp                  // nothing has changed
	CutReleased                 // writes go on
)

// CutNews tells the shell of a cut.
type CutNews struct {
	Cut   *Cut // the event it was asked with
	State CutState
	Layer ids.LayerID   // CutHeld: the layer that is complete
	Size  uint64        // CutHeld: bytes of the volume
	For   time.Duration // CutReleased: writes were held for so long
	Late  bool          // CutReleased: by itself, because nobody came in time
	Why   string        // CutGivenUp
}

// cut is the one under way.
type cut struct {
	ev     *Cut
	began  time.Duration
	held   bool
	ops    opQueue // that came since; bounded by what clients may have in flight
	pieces []piece // of older operations whose chunk came since
}

func (e *Engine) beginCut(ev *Cut) {
	give := func(why string) {
		e.out.Cuts = append(e.out.Cuts, CutNews{Cut: ev, State: CutGivenUp, Why: why})
	}
	v := ev.Volume
	switch chain := chainOf(v.Layers, ids.LayerID(v.Top)); {
	case e.state != Serving:
		give("the volume is " + e.state.String())
	case e.cut != nil:
		give("another cut is under way")
	case ids.Epoch(v.Epoch) != e.epoch || len(chain) == 0 || chain[0] != e.layers.top:
		give(fmt.Sprintf("the prepared layer %d does not stand on layer %d, which is written to", v.Top, e.layers.top))
	default:
		e.cut = &cut{ev: ev, began: e.now}
	}
}

// stepCut goes as far as it can.
func (e *Engine) stepCut() {
	c := e.cut
	if c == nil {
		return
	}
	switch {
	case e.state != Serving:
		e.endCut(CutGivenUp, "the volume is "+e.state.String())
	case e.now >= c.ev.Until:
		e.endCut(CutGivenUp, fmt.Sprintf("its writes were not durable after %v", e.now-c.began))
	case c.held || e.openJobs > 0:
	case e.flush.running || e.flush.wanted || len(e.flush.next) > 0:
	case e.flush.dirty > 0:
		e.flush.wanted = true
		e.startFlush()
	default:
		e.goOver(c)
	}
}

// goOver makes the prepared layer the top.
func (e *Engine) goOver(c *cut) {
	old := e.layers.top
	e.layers.top = ids.LayerID(c.ev.Volume.Top)
	e.layers.chain = append([]ids.LayerID{old}, e.layers.chain...)
	e.layers.take(c.ev.Volume)
	c.held = true
	e.out.Cuts = append(e.out.Cuts, CutNews{Cut: c.ev, State: CutHeld, Layer: old, Size: e.size})
}

// release lets the held writes go; the event names the cut, so that a late one
// does not end the next.
func (e *Engine) release(ev *Release) {
	if e.cut != nil && e.cut.ev == ev.Cut {
		e.endCut(CutGivenUp, "released before it was held")
	}
}

// endCut ends the cut: as released if it was held, else as s.
func (e *Engine) endCut(s CutState, why string) {
	c := e.cut
	e.cut = nil
	news := CutNews{Cut: c.ev, State: s, Why: why, For: e.now - c.began}
	if c.held {
		news.State, news.Late, news.Why = CutReleased, e.now >= c.ev.Until || e.state != Serving, ""
	}
	e.out.Cuts = append(e.out.Cuts, news)
	e.stats.MaxHold = max(e.stats.MaxHold, news.For)
	if e.state == Ended {
		return // unfinished has answered them
	}
	for _, p := range c.pieces {
		e.start(p)
	}
	e.admitAll(c.ops.takeAll())
}

// Cut asks to hold writes back and to go over to the layer that metadata has
// prepared: Volume is its answer. It is given up, or released, at Until.
type Cut struct {
	Volume *pb.Volume
	Until  time.Duration
}

// Release ends a Cut.
type Release struct{ Cut *Cut }

func (*Cut) event()     {}
func (*Release) event() {}
