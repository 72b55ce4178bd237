package client

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	watchSilence = 10 * time.Second // a node that says nothing for so long is left; it speaks every 3 s
	watchPause   = 100 * time.Millisecond
	watchMost    = 2 * time.Second // between two tries
)

// Watch tells fn what changes after a revision (0: from now on), in order, from
// whichever node answers, until ctx ends or fn returns an error. A reply with
// Resync says that changes may have been missed: the first one always does,
// unless it goes on from a revision that is remembered.
func (c *Client) Watch(ctx context.Context, after uint64, fn func(*pb.WatchReply) error) error {
	pause := watchPause
	turn := rand.IntN(1 << 16) // many watchers spread over the nodes
	for {
		addrs := c.addrs()
		if len(addrs) == 0 {
			return status.Errorf(status.Invalid, "no address of a metadata node is given: name a local cluster's directory or its metadata nodes")
		}
		heard, err := c.watchOne(ctx, addrs[turn%len(addrs)], &after, fn)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return err
		case heard:
			pause = watchPause
		default:
			pause = min(2*pause, watchMost)
		}
		turn++
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

// watchOne follows one node until it ends. Its error is fn's.
func (c *Client) watchOne(ctx context.Context, addr string, after *uint64, fn func(*pb.WatchReply) error) (heard bool, _ error) {
	conn, err := c.conn(addr)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	quiet := time.AfterFunc(watchSilence, cancel)
	defer quiet.Stop()
	st, err := pb.NewMetaClient(conn).Watch(ctx, &pb.WatchRequest{After: *after})
	if err != nil {
		return false, nil
	}
	for {
		rep, err := st.Recv()
		if err != nil {
			return heard, nil // another node goes on from the same revision
		}
		quiet.Reset(watchSilence)
		if rep.Detail != "" {
			return heard, nil
		}
		heard = true
		if err := fn(rep); err != nil {
			return heard, err
		}
		*after = rep.Revision
	}
}
