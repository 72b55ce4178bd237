package outage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
)

// idleFor is how long the client is watched undisturbed before each rebuild.
const idleFor = 5 * time.Second

// rebuild loses a store of a volume with two replicas for good and has its copies
// made on the third host, and compares what the client waits with what it waited
// right before, undisturbed.
func rebuild(ctx context.Context, l *lab) error {
	if err := l.CreateVolume(ctx, volumeName, volumeBytes, 2); err != nil {
		return err
	}
	uri, err := l.Attach(ctx, volumeName, gateway)
	if err != nil {
		return err
	}
	cfg := steady()
	cfg.Dial, cfg.Seed, cfg.Base, cfg.Blocks = check.NBD(uri, nil), l.cfg.Seed, areaBase, areaBlocks
	load := check.NewLoad(cfg)
	l.loads = append(l.loads, load)
	if err := fillUp(ctx, uri, l.cfg.Seed); err != nil {
		return err
	}
	l.begin(ctx, load)
	for round := range l.rounds {
		if err := l.settle(ctx, volumeName); err != nil {
			return err
		}
		from := load.History().NowNs()
		if err := wait(ctx, idleFor); err != nil {
			return err
		}
		idle := p99(load.History(), from)
		lost, err := l.lose(ctx)
		if err != nil {
			return err
		}
		from = load.History().NowNs()
		began := time.Now()
		if _, err := l.Cairn(ctx, "host", "drain", lost); err != nil {
			return err
		}
		if err := l.rebuilt(ctx, lost); err != nil {
			return errors.Join(err, l.alive())
		}
		busy := p99(load.History(), from)
		l.figures = append(l.figures, float64(busy)/float64(idle))
		l.talk(round, "p99 %v, and %v while 1 GiB was rebuilt in %v", idle, busy, time.Since(began).Round(100*time.Millisecond))
		if err := l.Release(lost); err != nil {
			return err
		}
		if _, err := l.Cairn(ctx, "host", "resume", lost); err != nil {
			return err
		}
	}
	return l.stop()
}

// lose takes away a host with a copy, not the gateway's, and returns when the
// volume goes on without it.
func (l *lab) lose(ctx context.Context) (host string, err error) {
	v, err := l.ShowVolume(ctx, volumeName)
	if err != nil {
		return "", err
	}
	for _, m := range v.Members {
		if m.Host != gateway {
			host = m.Host
		}
	}
	if err := errors.Join(l.Hold(host), l.Kill(host)); err != nil {
		return "", err
	}
	return host, l.awaitMembers(ctx, "the volume goes on without "+host, func(v map[string]bool) bool { return !v[host] })
}

// rebuilt waits until the volume has two copies in sync again, none on host.
func (l *lab) rebuilt(ctx context.Context, host string) error {
	return l.awaitMembers(ctx, "what was on "+host+" is elsewhere", func(v map[string]bool) bool {
		_, there := v[host]
		return !there && len(v) == 2
	})
}

// awaitMembers waits for a state of the members: host → whether it is in sync.
func (l *lab) awaitMembers(ctx context.Context, what string, ok func(inSync map[string]bool) bool) error {
	ctx, cancel := context.WithTimeout(ctx, settleMaxFor)
	defer cancel()
	return l.Await(ctx, what, func(ctx context.Context) (bool, string, error) {
		v, err := l.ShowVolume(ctx, volumeName)
		if err != nil {
			return false, "", err
		}
		inSync := map[string]bool{}
		for _, m := range v.Members {
			inSync[m.Host] = m.InSync
		}
		return ok(inSync), fmt.Sprintf("%+v", v), nil
	})
}

// p99 is how long the slowest hundredth of the operations answered since fromNs
// took at least.
func p99(h *check.History, fromNs int64) time.Duration {
	var took []int64
	for _, op := range h.Ops() {
		if !op.Unknown && op.InvokeNs >= fromNs && op.ReturnNs > 0 {
			took = append(took, op.ReturnNs-op.InvokeNs)
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return time.Duration(took[len(took)*99/100]).Round(time.Microsecond)
}
