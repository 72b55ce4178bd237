package outage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/cairnstore/cairn/chaos/check"
)

const (
	missedBytes = 1 << 30
	pieceBytes  = 1 << 20
	// killAtBytes is how much a catch-up has sent when one side of it is killed.
	killAtBytes = 256 << 20
)

// rejoin writes while a replica is away, and kills the replica and then the
// gateway while it catches up: what was sent before must not be sent again.
// What is sent between the last look and a kill is not counted: some MiB.
func rejoin(ctx context.Context, l *lab) error {
	load, uri, err := l.volume(ctx, volumeName, check.Config{Conns: 2, Depth: 4, Rate: 500})
	if err != nil {
		return err
	}
	for round := range l.rounds {
		if err := l.WaitInSync(ctx, volumeName); err != nil {
			return err
		}
		away := l.victim(round)
		if err := errors.Join(l.Hold(away), l.Kill(away)); err != nil {
			return err
		}
		if err := fillUp(ctx, uri, l.cfg.Seed+uint64(round)); err != nil {
			return err
		}
		if err := l.Release(away); err != nil {
			return err
		}
		l.begin(ctx, load)
		var sent uint64
		for _, node := range []string{away, gateway} {
			n, err := l.joined(ctx, away, killAtBytes)
			if err != nil {
				return err
			}
			sent += n
			l.talk(round, "%d MiB sent when %s is killed", n>>20, node)
			if err := l.interrupt(ctx, node, away); err != nil {
				return err
			}
		}
		n, err := l.joined(ctx, away, 0)
		if err != nil {
			return err
		}
		if err := l.stop(); err != nil {
			return err
		}
		l.add(round, float64(sent+n)/(1<<20))
	}
	return nil
}

// interrupt kills one side of the catch-up, waits until the one that ran has
// ended for the other side too, and lets the killed one come back.
func (l *lab) interrupt(ctx context.Context, node, away string) error {
	before, err := l.ShowVolume(ctx, volumeName)
	if err != nil {
		return err
	}
	if err := errors.Join(l.Hold(node), l.Kill(node)); err != nil {
		return err
	}
	if node == gateway { // a new gateway has a new epoch
		if err := l.Release(node); err != nil {
			return err
		}
	}
	wait, cancel := context.WithTimeout(ctx, settleMaxFor)
	defer cancel()
	err = l.Await(wait, "the catch-up of "+away+" has ended", func(ctx context.Context) (bool, string, error) {
		v, err := l.ShowVolume(ctx, volumeName)
		if err != nil || node == gateway {
			return err == nil && v.Epoch > before.Epoch, fmt.Sprintf("%+v", v), err
		}
		for _, m := range v.Members {
			if m.Host == away {
				return m.State != "in-sync" && m.State != "joining", fmt.Sprintf("%+v", v), nil
			}
		}
		return false, fmt.Sprintf("%+v", v), nil
	})
	return errors.Join(err, l.Release(node))
}

// joined waits until a catch-up of the host has sent so many bytes, or with
// 0 until it is done, and returns how many it has sent.
func (l *lab) joined(ctx context.Context, host string, untilBytes uint64) (sent uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, settleMaxFor)
	defer cancel()
	var seen uint64
	err = l.Await(ctx, host+" catches up", func(ctx context.Context) (bool, string, error) {
		v, err := l.ShowVolume(ctx, volumeName)
		if err != nil {
			return false, "", err
		}
		for _, m := range v.Members {
			if m.Host == host && (m.State == "joining" || m.State == "in-sync") {
				seen = max(seen, m.JoinedBytes)
				done := m.State == "in-sync" && m.InSync
				return done && seen > 0 || untilBytes > 0 && seen >= untilBytes, fmt.Sprintf("%+v", v), nil
			}
		}
		return false, fmt.Sprintf("%+v", v), nil
	})
	return seen, err
}

// fillUp writes missedBytes behind the load's area, every block another.
func fillUp(ctx context.Context, uri string, seed uint64) (err error) {
	dev, err := check.NBD(uri, nil)(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	rng := rand.New(rand.NewPCG(seed, 0))
	p := make([]byte, pieceBytes)
	for at := int64(0); at < missedBytes; at += pieceBytes {
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
		}
		if _, err := dev.WriteAt(p, volumeBytes/2+at); err != nil {
			return err
		}
	}
	return dev.Flush()
}
