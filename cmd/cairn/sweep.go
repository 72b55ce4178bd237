package main

import (
	"context"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/wire"
)

// answers is a wire.Sink that hands replies to a channel with room for them.
type answers chan *wire.Reply

// Replies implements wire.Sink.
func (a answers) Replies(rs []*wire.Reply) {
	for _, r := range rs {
		a <- r
	}
}

// sweepStore drops, from one store, the volumes that metadata says are gone.
func sweepStore(ctx context.Context, meta querier, s *hostStore) error {
	held := s.Volumes()
	if len(held) == 0 {
		return nil
	}
	ask := &pb.GoneVolumes{}
	for id := range held {
		ask.VolumeIds = append(ask.VolumeIds, uint64(id))
	}
	rep, err := meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Gone{Gone: ask}})
	if err != nil || len(rep.Gone) == 0 {
		return err
	}
	var reqs []*wire.Request
	for i, id := range rep.Gone {
		reqs = append(reqs, &wire.Request{Kind: wire.Drop, ID: uint64(i), Store: s.ID(), Volume: ids.VolumeID(id), Epoch: ids.MaxEpoch})
	}
	got := make(answers, len(reqs))
	s.Submit(reqs, got)
	for range reqs {
		select {
		case r := <-got:
			if e := r.Err(); e != nil && err == nil {
				err = e
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

// querier is the reading half of the metadata client.
type querier interface {
	Query(ctx context.Context, q *pb.QueryRequest) (*pb.QueryReply, error)
}
