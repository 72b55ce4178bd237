package outage

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/chaos/cluster"
	"github.com/cairnstore/cairn/chaos/fault"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	volumeName  = "v"
	volumeBytes = 4 << 30
	gateway     = "host-1"

	areaBase   = 60 << 20 // the area lies on two chunks
	areaBlocks = 2048

	calmFor      = 300 * time.Millisecond // between two outages
	settleMaxFor = 2 * time.Minute
	judgeMaxFor  = 5 * time.Minute
)

// lab is a cluster with a volume, the load on it, and the figures so far.
type lab struct {
	*cluster.Cluster
	cfg     Config
	name    string
	rounds  int
	figures []float64
	loads   []*check.Load

	stop func() error // ends the running load; nil: none runs
	done <-chan error // the running load's early end
}

func newLab(ctx context.Context, cfg Config, name string, rounds int) (*lab, error) {
	c, err := cluster.Start(ctx, cluster.Config{Bin: cfg.Bin})
	if err != nil {
		return nil, err
	}
	return &lab{Cluster: c, cfg: cfg, name: name, rounds: rounds}, nil
}

func (l *lab) close() error {
	var err error
	if l.stop != nil {
		err = l.stop()
	}
	return errors.Join(err, l.Close())
}

// talk says how far it is.
func (l *lab) talk(round int, format string, args ...any) {
	fmt.Fprintf(l.cfg.Talk, "%s %d of %d: %s\n", l.name, round+1, l.rounds, fmt.Sprintf(format, args...))
}

// add keeps a round's figure.
func (l *lab) add(round int, figure float64) {
	l.figures = append(l.figures, figure)
	l.talk(round, "%.4g", figure)
}

func (l *lab) addMs(round int, d time.Duration) { l.add(round, float64(d.Microseconds())/1000) }

// volume creates and attaches a volume, and prepares the load that cfg
// describes for it.
func (l *lab) volume(ctx context.Context, name string, cfg check.Config) (load *check.Load, uri string, err error) {
	if err := l.CreateVolume(ctx, name, volumeBytes, 3); err != nil {
		return nil, "", err
	}
	if uri, err = l.Attach(ctx, name, gateway); err != nil {
		return nil, "", err
	}
	cfg.Dial, cfg.Seed, cfg.Base, cfg.Blocks = check.NBD(uri, nil), l.cfg.Seed+uint64(len(l.loads)), areaBase, areaBlocks
	load = check.NewLoad(cfg)
	l.loads = append(l.loads, load)
	return load, uri, touch(ctx, uri)
}

// touch writes a block before the area: a volume has no replicas before it has
// a chunk.
func touch(ctx context.Context, uri string) error {
	dev, err := check.NBD(uri, nil)(ctx)
	if err != nil {
		return err
	}
	_, err = dev.WriteAt(make([]byte, check.BlockBytes), areaBase-check.BlockBytes)
	return errors.Join(err, dev.Close())
}

// steady is the load under which stalls are measured: enough that one is seen,
// little enough that the queue itself is none.
func steady() check.Config { return check.Config{Conns: 2, Depth: 4, Rate: 2000} }

// begin runs the load until l.stop.
func (l *lab) begin(ctx context.Context, load *check.Load) {
	ctx, cancel := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- load.Run(ctx) }()
	l.done = ran
	l.stop = func() error { cancel(); l.stop = nil; return <-ran }
}

// alive fails when the load has ended by itself.
func (l *lab) alive() error {
	select {
	case err := <-l.done:
		l.stop = nil
		return fmt.Errorf("the client's load failed: %w", err)
	default:
		return nil
	}
}

// settle waits until all replicas of the volume are in sync and some time of
// undisturbed load has passed.
func (l *lab) settle(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, settleMaxFor)
	defer cancel()
	if err := l.WaitInSync(ctx, name); err != nil {
		return errors.Join(err, l.alive())
	}
	return errors.Join(wait(ctx, calmFor), l.alive())
}

// stalls runs the outage again and again under one load and adds the longest
// answer from its beginning until everything is in sync again.
func (l *lab) stalls(ctx context.Context, outage func(round int) error) error {
	load, _, err := l.volume(ctx, volumeName, steady())
	if err != nil {
		return err
	}
	l.begin(ctx, load)
	for round := range l.rounds {
		if err := l.settle(ctx, volumeName); err != nil {
			return err
		}
		from := load.History().NowNs()
		if err := outage(round); err != nil {
			return err
		}
		if err := l.settle(ctx, volumeName); err != nil {
			return err
		}
		l.addMs(round, load.History().Longest(from, load.History().NowNs()))
	}
	return l.stop()
}

// atOnce kills nodes at about the same instant; one that is down already is
// left so.
func (l *lab) atOnce(names ...string) error {
	died := make(chan error, len(names))
	for _, name := range names {
		go func() { died <- l.Kill(name) }()
	}
	var errs []error
	for range names {
		if err := <-died; err != nil && !errors.Is(err, status.NotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// hosts are all hosts' names; the first is the gateway's.
func (l *lab) hosts() []string { return l.Names(fault.KindHost) }

// victim is a host that is not the gateway's, another each round.
func (l *lab) victim(round int) string {
	hosts := l.hosts()
	return hosts[1+round%(len(hosts)-1)]
}

// account is what the loads did.
func (l *lab) account() string {
	answered, unknown, lost := 0, 0, 0
	for _, load := range l.loads {
		st := load.Stats()
		lost += st.Reconnects
		for _, k := range st.Kinds {
			answered, unknown = answered+k.Count, unknown+k.Unknown
		}
	}
	return fmt.Sprintf("%d answered, 0 errors, %d cut off by %d lost connections", answered, unknown, lost)
}

// judge checks that what all clients saw could have happened on one disk.
func (l *lab) judge(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, judgeMaxFor)
	defer cancel()
	for _, load := range l.loads {
		if err := check.Linearizable(ctx, load.History()); err != nil {
			return err
		}
	}
	return nil
}
