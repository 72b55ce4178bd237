package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
)

// eventView is one event as `-o json` shows it.
type eventView struct {
	Seq     uint64 `json:"seq"`
	Time    string `json:"time"`
	Who     string `json:"who"`
	What    string `json:"what"`
	Outcome string `json:"outcome"` // done, or why not
}

func viewEvent(e *pb.Event) eventView {
	v := eventView{e.Seq, formatTime(e.TimeUnixNs), dash(e.Who), e.What, e.Outcome}
	if v.Outcome == "" {
		v.Outcome = "done"
	}
	return v
}

const eventsMax = 1000 // in one answer

func (s *session) events(ctx context.Context, after uint64) ([]*pb.Event, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Events{Events: &pb.Events{After: after, Limit: eventsMax}}})
	if err != nil {
		return nil, err
	}
	return rep.Events, nil
}

// allEvents asks until there are no more.
func (s *session) allEvents(ctx context.Context, after uint64) (all []*pb.Event, err error) {
	for {
		list, err := s.events(ctx, after)
		if all = append(all, list...); err != nil || len(list) == 0 {
			return all, err
		}
		after = list[len(list)-1].Seq
	}
}

func eventsCommand(c *cli) *cobra.Command {
	var out outputFlag
	var after uint64
	var last int
	var follow bool
	cmd := &cobra.Command{
		Use: "events", Short: "Who did what, when, with what outcome", Args: cobra.NoArgs,
		Example: "  cairn events --last 50\n  cairn events --follow -o json | jq .what",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if follow {
				return c.forever(cmd.Context(), func(ctx context.Context, s *session) error { return s.follow(ctx, &out, after) })
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				list, err := s.allEvents(ctx, after)
				if err != nil {
					return err
				}
				if last > 0 {
					list = list[max(0, len(list)-last):]
				}
				evs, rows := []eventView{}, [][]string{}
				for _, e := range list {
					v := viewEvent(e)
					evs = append(evs, v)
					rows = append(rows, []string{fmt.Sprint(v.Seq), v.Time, v.Who, v.What, v.Outcome})
				}
				return out.show(evs, []string{"SEQ", "TIME", "WHO", "WHAT", "OUTCOME"}, rows)
			})
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "only events with a higher number")
	cmd.Flags().IntVarP(&last, "last", "n", 0, "only the last so many (all that are kept: 10,000)")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens, one line each (JSON: one object a line), until Ctrl-C")
	out.register(cmd)
	return cmd
}

// follow prints events as they come. The watch says that there are some; a node
// that tells of one may be ahead of nobody: the leader, who is asked, has it.
func (s *session) follow(ctx context.Context, out *outputFlag, after uint64) error {
	if out.format != "json" && out.format != "table" {
		return usagef("-o %s is not a format: table or json", out.format)
	}
	return s.meta.Watch(ctx, 0, func(rep *pb.WatchReply) error {
		news := rep.Resync
		for _, c := range rep.Changes {
			e, is := c.What.(*pb.Change_Event)
			news = news || is && e.Event > after
		}
		for news {
			qctx, cancel := context.WithTimeout(ctx, cliWait)
			list, err := s.events(qctx, after)
			cancel()
			if err != nil {
				return err
			}
			for _, e := range list {
				after = e.Seq
				if err := printEvent(out, viewEvent(e)); err != nil {
					return err
				}
			}
			news = len(list) == eventsMax
		}
		return nil
	})
}

func printEvent(out *outputFlag, v eventView) error {
	if out.format == "json" {
		return json.NewEncoder(os.Stdout).Encode(v)
	}
	_, err := fmt.Printf("%-6d %s  %s: %s (%s)\n", v.Seq, v.Time, v.Who, v.What, v.Outcome)
	return err
}

// forever runs f with a session until Ctrl-C, which is a good end.
func (c *cli) forever(ctx context.Context, f func(ctx context.Context, s *session) error) error {
	err := c.with(ctx, 100*365*24*time.Hour, f)
	if ctx.Err() != nil {
		return nil
	}
	return err
}
