package sim

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// agent is one process's client of the metadata service: what meta/client does
// with numbers and unknown outcomes, in virtual time.
type agent struct {
	w            *world
	name, host   string
	blockedUntil time.Duration // the way to the service
	opened       int
	free         []*session
	closed       bool
	calls        int          // not answered
	run          func(func()) // lets something happen in the process
}

type session struct {
	name   string
	opened bool
	seq    uint64 // last number whose fate is known
	doubt  bool   // seq+1 was sent, and may yet be done
}

func newAgent(w *world, name, host string, run func(func())) *agent {
	return &agent{w: w, name: name, host: host, run: run}
}

// close is the end of the process: nobody waits for answers any more.
func (a *agent) close() {
	a.closed = true
	a.w.meta.calls -= a.calls
	a.calls = 0
}

// agent returns the client of a host's chunk server process.
func (m *meta) agent(host string) *agent {
	for _, a := range m.agents {
		if a.host == host {
			return a
		}
	}
	a := newAgent(m.w, host+"-store", host, func(f func()) { f() })
	m.agents = append(m.agents, a)
	return a
}

// call is one command until its fate is known.
type call struct {
	a       *agent
	s       *session
	cmd     *pb.Command
	refused error
	done    func(*pb.Result, error)
}

// do commits one mutation; done hears of it once, unless the process ends.
func (a *agent) do(cmd *pb.Command, done func(*pb.Result, error)) {
	var s *session
	if n := len(a.free); n > 0 {
		s, a.free = a.free[n-1], a.free[:n-1]
	} else {
		s = a.newSession()
	}
	a.calls++
	a.w.meta.calls++
	c := &call{a: a, s: s, cmd: proto.Clone(cmd).(*pb.Command), done: done}
	c.try(0)
}

func (a *agent) newSession() *session {
	a.opened++
	return &session{name: fmt.Sprintf("%s/%d", a.name, a.opened)}
}

// try sends the command, or opens its session first, after d.
func (c *call) try(d time.Duration) {
	a := c.a
	a.w.after(d, func() {
		if a.closed {
			return
		}
		cmd := proto.Clone(c.cmd).(*pb.Command)
		switch {
		case !c.s.opened:
			cmd = &pb.Command{Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}}
		case c.refused != nil:
			cmd.Op = nil // to settle the number
			fallthrough
		default:
			cmd.Seq = c.s.seq + 1
		}
		cmd.Session = c.s.name
		c.send(cmd)
	})
}

// send is one try: the request, or its answer, may be late or lost, and a late
// request may still be done.
func (c *call) send(cmd *pb.Command) {
	a, w := c.a, c.a.w
	answered := false
	answer := func(res *pb.Result) {
		if !answered {
			answered = true
			if !a.closed {
				c.answer(res, cmd)
			}
		}
	}
	out := w.span(100*time.Microsecond, time.Millisecond)
	if a.blockedUntil > w.now {
		out += a.blockedUntil - w.now
	}
	w.meta.sent++
	w.after(out, func() {
		w.meta.sent--
		w.meta.do(cmd, func(res *pb.Result) {
			res = proto.Clone(res).(*pb.Result)
			back := w.span(100*time.Microsecond, time.Millisecond)
			if a.blockedUntil > w.now {
				back += a.blockedUntil - w.now
			}
			w.after(back, func() { a.run(func() { answer(res) }) })
			if w.faults.echo() { // the network brings the request once more
				w.meta.sent++
				w.after(w.span(0, 300*time.Millisecond), func() { w.meta.sent--; w.meta.do(cmd, func(*pb.Result) {}) })
			}
		})
	})
	timeout := 2 * time.Second
	if cmd.GetAttach() != nil || cmd.GetDetach() != nil {
		timeout = 20 * time.Second
	}
	w.after(timeout, func() { a.run(func() { answer(nil) }) })
}

// answer decides what an answer, or none, means.
func (c *call) answer(res *pb.Result, cmd *pb.Command) {
	s, again := c.s, c.a.w.span(5*time.Millisecond, 60*time.Millisecond)
	if cmd.GetOpenSession() != nil {
		s.opened = res != nil && res.Status == 0
		if s.opened {
			again = 0
		}
		c.try(again)
		return
	}
	if res == nil {
		s.doubt = true
		c.try(again)
		return
	}
	kind := status.Kind(res.Status)
	switch {
	case kind == status.Expired: // the clock of a new leader may be most of an hour ahead
		c.s = c.a.newSession()
		if s.doubt {
			c.end(nil, status.Errorf(status.Unknown, "session %s is gone, and its last command in doubt", s.name))
			return
		}
		c.try(again)
	case res.Refused && kind == status.Unavailable:
		c.try(again)
	case res.Refused && !s.doubt:
		c.end(nil, status.New(kind, res.Detail))
	case res.Refused:
		c.refused = status.New(kind, res.Detail)
		c.try(again)
	case kind == status.Unknown || kind == status.Unavailable:
		s.doubt = true
		c.try(again)
	default:
		s.doubt = false
		s.seq++
		if c.refused != nil && kind == status.Unsupported {
			c.end(nil, c.refused)
			return
		}
		if kind != status.OK {
			c.end(nil, status.New(kind, res.Detail))
			return
		}
		c.end(res, nil)
	}
}

func (c *call) end(res *pb.Result, err error) {
	c.a.free = append(c.a.free, c.s)
	c.a.calls--
	c.a.w.meta.calls--
	c.done(res, err)
}

// renew asks once; an answer that does not come in time does not count.
func (a *agent) renew(req *pb.RenewRequest, done func(*pb.RenewReply)) {
	w := a.w
	late := w.now + 2*time.Second
	a.roundTrip(func(back func(func())) {
		w.meta.renew(req, func(rep *pb.RenewReply) {
			back(func() {
				if w.now < late {
					done(rep)
				}
			})
		})
	})
}

// query reads of metadata, linearizably, and again until it is answered.
func query[T any](a *agent, read func(state.KV) T, done func(T)) {
	w := a.w
	a.roundTrip(func(back func(func())) {
		if w.meta.leader == nil {
			w.after(w.span(10*time.Millisecond, 60*time.Millisecond), func() { query(a, read, done) })
			return
		}
		v := read(w.meta.kv)
		back(func() { done(v) })
	})
}

// roundTrip carries f to the service and what it gives back.
func (a *agent) roundTrip(f func(back func(func()))) {
	w := a.w
	way := func() time.Duration {
		return max(a.blockedUntil-w.now, 0) + w.span(100*time.Microsecond, time.Millisecond)
	}
	if a.closed {
		return
	}
	w.after(way(), func() {
		f(func(g func()) {
			w.after(way(), func() {
				if !a.closed {
					a.run(g)
				}
			})
		})
	})
}
