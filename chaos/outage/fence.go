package outage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
)

const (
	frozenVolumes = 20
	frozenFor     = 30 * time.Second
	// successors number the clients of the gateway that took over.
	successors = 1000
)

// takeover attaches a volume elsewhere, whoever holds it.
func (l *lab) takeover(ctx context.Context, name, host string) (uri string, err error) {
	out, err := l.Cairn(ctx, "volume", "attach", name, "--host", host, "--takeover")
	return strings.TrimSpace(out), err
}

// frozenGateway stops a gateway under load, attaches its volumes elsewhere,
// makes I/O there and on the old connections, and lets it go on (P4).
func frozenGateway(ctx context.Context, l *lab) error {
	var vs []*frozen
	for i := range frozenVolumes {
		v := &frozen{lab: l, name: fmt.Sprintf("v%d", i)}
		var err error
		// What the old gateway answers once it goes on are errors, as it should.
		cfg := check.Config{Conns: 1, Depth: 4, Rate: 100, Tolerate: func(error) bool { return true }}
		if v.old, v.uri, err = l.volume(ctx, v.name, cfg); err != nil {
			return err
		}
		v.next = check.NewLoad(check.Config{Seed: l.cfg.Seed + uint64(i), Base: areaBase, Blocks: areaBlocks, Conns: 1, Depth: 4, Rate: 400, Ops: 400,
			History: v.old.History(), FirstClient: successors})
		vs = append(vs, v)
	}
	for round := range l.rounds {
		wrong := 0
		if err := eachVolume(vs, func(v *frozen) error { return v.prepare(ctx, round > 0) }); err != nil {
			return err
		}
		if err := wait(ctx, time.Second); err != nil {
			return err
		}
		paused := make(chan error, 1)
		go func() { paused <- l.Pause(gateway, frozenFor) }()
		err := eachVolume(vs, func(v *frozen) error { return v.moveOn(ctx) })
		if err := errors.Join(err, <-paused); err != nil {
			return err
		}
		if err := eachVolume(vs, func(v *frozen) error { return v.finish(ctx) }); err != nil {
			return err
		}
		for _, v := range vs {
			wrong += v.late
		}
		l.add(round, float64(wrong))
	}
	return nil
}

// eachVolume does the same to all volumes at the same time.
func eachVolume(vs []*frozen, f func(*frozen) error) error {
	done := make(chan error, len(vs))
	for _, v := range vs {
		go func() { done <- f(v) }()
	}
	var errs []error
	for range vs {
		errs = append(errs, <-done)
	}
	return errors.Join(errs...)
}

// frozen is one volume of a gateway that is stopped.
type frozen struct {
	*lab
	name string
	old  *check.Load // on the gateway that will be stopped
	next *check.Load // on the one that takes over; the same history
	uri  string

	idle  check.Device // an old connection on which nothing was asked before the takeover
	stop  func() error
	since int64 // history's time when the takeover's attach returned
	asked int
	done  chan error
	late  int // answers that must not be
}

// prepare puts the volume on the gateway again and begins the old load.
func (v *frozen) prepare(ctx context.Context, again bool) (err error) {
	if again {
		if err := v.Detach(ctx, v.name); err != nil {
			return err
		}
		if v.uri, err = v.Attach(ctx, v.name, gateway); err != nil {
			return err
		}
	}
	dial := check.NBD(v.uri, nil)
	v.old.SetDial(dial)
	if v.idle, err = dial(ctx); err != nil {
		return err
	}
	runCtx, cancel := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- v.old.Run(runCtx) }()
	v.stop = func() error { cancel(); return <-ran }
	v.late = 0
	return nil
}

// moveOn takes the volume over while its gateway is stopped, uses it there, and
// then asks on the old connection.
func (v *frozen) moveOn(ctx context.Context) error {
	uri, err := v.takeover(ctx, v.name, "host-2")
	if err != nil {
		return err
	}
	v.since = v.old.History().NowNs()
	v.next.SetDial(check.NBD(uri, nil))
	if err := v.next.Run(ctx); err != nil {
		return err
	}
	const reads, writes = 64, 4
	v.done = make(chan error, reads+writes)
	v.asked = reads + writes
	for b := range int64(reads) {
		go func() {
			_, err := v.idle.ReadAt(make([]byte, check.BlockBytes), areaBase+b*check.BlockBytes)
			v.done <- err
		}()
	}
	for b := range int64(writes) {
		go func() {
			// Bytes no load writes: whoever reads them later, finds them torn.
			p := []byte(strings.Repeat("late write ", check.BlockBytes/11+1))[:check.BlockBytes]
			_, err := v.idle.WriteAt(p, areaBase+b*check.BlockBytes)
			v.done <- err
		}()
	}
	return nil
}

// finish counts what the old gateway answered after it went on, and whether
// anything of it was applied.
func (v *frozen) finish(ctx context.Context) error {
	for range v.asked {
		if <-v.done == nil {
			v.late++
		}
	}
	if err := v.idle.Close(); err != nil && !errors.Is(err, check.ErrDisconnected) {
		return err
	}
	// The old load's connection is gone for good; what it had asked is unknown.
	if err := v.stop(); err != nil && !strings.Contains(err.Error(), "could not be reached") {
		return err
	}
	if err := v.next.Run(ctx); err != nil {
		return err
	}
	if _, err := v.next.ReadAll(ctx); err != nil {
		return err
	}
	v.late += lateAnswers(v.old.History().Ops(), v.since)
	return nil
}

// lateAnswers counts the answers that clients of the old gateway were given to
// what they asked after sinceNs, and the old gateway's writes that were first
// seen after something else had been seen in their place by the new one's
// clients: applied late.
func lateAnswers(ops []check.Op, sinceNs int64) int {
	late := 0
	other := map[uint64]int64{} // register: when something of the new gateway was first known there
	for _, op := range ops {
		isOld := op.Client < successors
		switch {
		case op.InvokeNs < sinceNs || op.Unknown || op.Kind == check.Flush:
		case isOld:
			late++
		default:
			if _, ok := other[op.Block]; !ok || op.ReturnNs < other[op.Block] {
				other[op.Block] = op.ReturnNs
			}
		}
	}
	first := map[uint64]check.Value{} // what the earliest known was
	for _, op := range ops {
		if at, ok := other[op.Block]; ok && op.Client >= successors && !op.Unknown && op.Kind != check.Flush && op.ReturnNs == at {
			first[op.Block] = op.Value
		}
	}
	for _, op := range ops {
		isOldValue := op.Value != 0 && int(uint64(op.Value)>>check.ValueClientShift) < successors
		if op.Kind == check.Read && !op.Unknown && isOldValue && op.Client >= successors && op.InvokeNs >= sinceNs &&
			op.InvokeNs > other[op.Block] && op.Value != first[op.Block] {
			late++
		}
	}
	return late
}

// deadGateway kills a gateway with many operations in flight and attaches the
// volume elsewhere, twice: what is read first, stays (P3), wherever it is read.
func deadGateway(ctx context.Context, l *lab) error {
	load, _, err := l.volume(ctx, volumeName, check.Config{Conns: 1, Depth: 64, Rate: 1 << 20})
	if err != nil {
		return err
	}
	at := 0
	for round := range l.rounds {
		if err := l.settle(ctx, volumeName); err != nil {
			return err
		}
		hosts := l.hosts()
		old, next, third := hosts[at%3], hosts[(at+1)%3], hosts[(at+2)%3]
		at += 2
		l.begin(ctx, load)
		for load.Waiting() < 60 {
			if err := errors.Join(l.alive(), wait(ctx, time.Millisecond)); err != nil {
				return err
			}
		}
		// Its clients leave: started again it would serve them, until the takeover.
		if err := errors.Join(l.Kill(old), l.stop()); err != nil {
			return err
		}
		uri, err := l.takeover(ctx, volumeName, next)
		if err != nil {
			return err
		}
		load.SetDial(check.NBD(uri, nil))
		before, err := load.ReadAll(ctx)
		if err != nil {
			return err
		}
		if err := l.Detach(ctx, volumeName); err != nil {
			return err
		}
		if uri, err = l.Attach(ctx, volumeName, third); err != nil {
			return err
		}
		load.SetDial(check.NBD(uri, nil))
		after, err := load.ReadAll(ctx)
		if err != nil {
			return err
		}
		flips := 0
		for register, v := range before {
			if after[register] != v {
				flips++
			}
		}
		l.add(round, float64(flips))
	}
	return nil
}
