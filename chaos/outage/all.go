package outage

import (
	"context"
	"fmt"
	"time"
)

// firstAnswer waits for the first answer to something asked at or after fromNs.
func (l *lab) firstAnswer(ctx context.Context, fromNs int64) (time.Duration, error) {
	history := l.loads[0].History()
	ctx, cancel := context.WithTimeout(ctx, settleMaxFor)
	defer cancel()
	for {
		if at, ok := history.FirstAnswer(fromNs); ok {
			return time.Duration(at - fromNs), nil
		}
		if err := wait(ctx, 5*time.Millisecond); err != nil {
			return 0, fmt.Errorf("no answer in %v: %w", settleMaxFor, err)
		}
		if err := l.alive(); err != nil {
			return 0, err
		}
	}
}

// killAll kills all hosts' processes; their supervisor starts them again.
func killAll(ctx context.Context, l *lab) error {
	load, _, err := l.volume(ctx, volumeName, steady())
	if err != nil {
		return err
	}
	l.begin(ctx, load)
	for round := range l.rounds {
		if err := l.settle(ctx, volumeName); err != nil {
			return err
		}
		if err := l.atOnce(l.hosts()...); err != nil {
			return err
		}
		took, err := l.firstAnswer(ctx, load.History().NowNs())
		if err != nil {
			return err
		}
		l.addMs(round, took)
	}
	if err := l.settle(ctx, volumeName); err != nil {
		return err
	}
	return l.stop()
}

// powerCut kills all hosts' processes and brings them back one after the other
// as if the machines had lost power: under another boot id, so that no store
// may call its unflushed data intact. (The page cache keeps what a real cut
// would take; the simulator and the crash points take it.)
func powerCut(ctx context.Context, l *lab) error {
	load, _, err := l.volume(ctx, volumeName, steady())
	if err != nil {
		return err
	}
	l.begin(ctx, load)
	for round := range l.rounds {
		if err := l.settle(ctx, volumeName); err != nil {
			return err
		}
		for _, h := range l.hosts() {
			if err := l.Hold(h); err != nil {
				return err
			}
		}
		if err := l.atOnce(l.hosts()...); err != nil {
			return err
		}
		if err := reboot(l.Dir(), fmt.Sprintf("00000000-0000-4000-8000-%012d", round)); err != nil {
			return err
		}
		for _, h := range l.hosts() {
			if err := wait(ctx, time.Second); err != nil {
				return err
			}
			if err := l.Release(h); err != nil {
				return err
			}
		}
		took, err := l.firstAnswer(ctx, load.History().NowNs())
		if err != nil {
			return err
		}
		l.addMs(round, took)
	}
	if err := l.settle(ctx, volumeName); err != nil {
		return err
	}
	return l.stop()
}
