package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// handOver is the way of a volume to another host's writer, which is ready to
// attach it:
//
//	drain and flush, while new operations wait → ask metadata to move the epoch,
//	serving nothing from before that on → ended, or, if it was refused, serving
//
// The new holder's attach waits for no lease: nobody reads here any more by then.
// It is told of by the answer, or finds itself the holder.
type handOver struct {
	host, session string
	call          *MetaCall
	asked         bool          // before, with an unknown outcome
	after         time.Duration // not asked again before
}

// beginHandOver starts, or with no host gives it up if metadata was not asked yet.
func (e *Engine) beginHandOver(ev *HandOver) {
	switch {
	case ev.Host == "" && e.state == Draining && e.hand != nil && e.hand.call == nil && !e.hand.asked:
		e.stay()
	case ev.Host != "" && e.state == Serving:
		e.hand = &handOver{host: ev.Host, session: ev.Session}
		e.state, e.why = Draining, "being handed over to "+ev.Host
		e.flush.wanted = true
	}
}

// stay serves on: the hand-over, or the detach, did not happen and cannot any more.
func (e *Engine) stay() {
	e.hand, e.state, e.why = nil, Serving, ""
	e.admitAll(e.waiting.takeAll())
}

// stepHandOver asks once nothing is in flight and all is durable.
func (e *Engine) stepHandOver() {
	h := e.hand
	if h == nil || h.call != nil || e.now < h.after || e.flush.running || e.flush.wanted || e.dirty() || e.metaBusy() {
		return
	}
	waiting := e.waiting
	e.waiting = opQueue{}
	busy := len(e.unfinished()) > 0
	e.waiting = waiting
	if busy {
		return
	}
	h.call = &MetaCall{HandOver: &pb.HandOver{VolumeId: uint64(e.volume), Epoch: uint32(e.epoch), Host: h.host, Session: h.session}}
	e.out.Meta = append(e.out.Meta, h.call)
}

// handedOver takes the answer. While the outcome is unknown it is asked for
// again, and nothing is served.
func (e *Engine) handedOver(ev *MetaDone) {
	switch k := status.Of(ev.Err); k {
	case status.OK:
		e.end("handed over to " + e.hand.host)
	case status.Unavailable, status.Unknown, status.Timeout, status.Shutdown, status.Conflict:
		e.hand.call, e.hand.asked, e.hand.after = nil, true, e.now+metaRetry
	default:
		if e.hand.asked { // an earlier asking may have been done
			e.hand.call, e.hand.after = nil, e.now+metaRetry
			return
		}
		e.stay()
	}
}
