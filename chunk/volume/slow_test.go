package volume

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// TestSlowOperationsTellWhy: each stage's time is its own.
func TestSlowOperationsTellWhy(t *testing.T) {
	e := &Engine{out: &Out{}, now: time.Second}
	r0, r1 := &replica{index: 4, local: true}, &replica{index: 7}
	var l legs
	l[0], l[1] = leg{sent: 1030 * time.Millisecond}, leg{sent: 1030 * time.Millisecond}
	l[0].answered(5*time.Millisecond, 0, true)
	l[1].answered(20*time.Millisecond, 12_000, false)
	op := &Op{Kind: OpWrite, Off: 4096, Len: 8192, Waited: 2 * time.Millisecond, at: time.Second}
	e.now = 1060 * time.Millisecond
	e.cause = cause{legs: &l, replicas: []*replica{r0, r1}}
	e.done(op, status.OK)
	s := e.Slowest()
	if len(s) != 1 {
		t.Fatalf("%d operations are kept", len(s))
	}
	ms := time.Millisecond
	if got := s[0]; got.Total != 62*ms || got.Waited != 2*ms || got.Before != 30*ms || got.After != 10*ms || len(got.Legs) != 2 ||
		got.Legs[0] != (Leg{4, true, 5 * ms, 5 * ms}) || got.Legs[1] != (Leg{7, true, 20 * ms, 12 * ms}) {
		t.Errorf("got %+v", got)
	}
	// One that never answered is shown so; nothing follows it.
	l[1] = leg{sent: 1030 * ms}
	op = &Op{Kind: OpWrite, Len: 8192, at: time.Second}
	e.now = 3 * time.Second
	e.cause = cause{legs: &l, replicas: []*replica{r0, r1}}
	e.done(op, status.OK)
	if got := e.Slowest()[0]; got.Total != 2*time.Second || got.Legs[1].Answered || got.Legs[1].Time != 1970*ms || got.After != 1965*ms {
		t.Errorf("got %+v", got)
	}
}

// TestSlowLogKeepsTheSlowest of two windows, and forgets older ones.
func TestSlowLogKeepsTheSlowest(t *testing.T) {
	e := &Engine{out: &Out{}}
	end := func(n int) {
		op := &Op{Kind: OpRead, at: e.now}
		e.now += time.Duration(n) * time.Millisecond
		e.done(op, status.OK)
		e.out.Reset()
	}
	for i := range 200 {
		end(1 + i*37%200)
	}
	s := e.Slowest()
	if len(s) != slowMax || s[0].Total != 200*time.Millisecond || s[slowMax-1].Total != 169*time.Millisecond {
		t.Errorf("%d kept, from %v to %v", len(s), s[0].Total, s[len(s)-1].Total)
	}
	e.now += slowWindow
	end(1)
	if s := e.Slowest(); len(s) != slowMax+1 || s[slowMax].Total != time.Millisecond {
		t.Errorf("%d kept in the next window", len(s))
	}
	e.now += slowWindow
	end(1)
	if s := e.Slowest(); len(s) != 2 {
		t.Errorf("%d kept after two windows", len(s))
	}
	op := &Op{}
	if n := testing.AllocsPerRun(1000, func() { *op = Op{at: e.now}; e.note(op, status.OK) }); n > 0 {
		t.Errorf("%v allocations per operation", n)
	}
}
