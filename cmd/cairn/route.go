package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func routeCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "route", Short: "Routes of the storage network"}
	cmd.AddCommand(routeAddCommand(c), routeRemoveCommand(c), routeListCommand(c), routeWatchCommand(c))
	return cmd
}

func routeAddCommand(c *cli) *cobra.Command {
	var host string
	cmd := &cobra.Command{
		Use:   "add --host HOST DESTINATION [via ADDRESS] dev LINK [nexthop …]",
		Short: "Add a route on a host, or change the one to that destination; kept over restarts",
		Example: `  cairn route add --host host-1 10.255.0.9 via 10.101.1.0 dev s1
  cairn route add --host host-1 10.255.0.9 nexthop via 10.101.1.0 dev s1 nexthop via 10.102.1.0 dev s2`,
		Args: cobra.MinimumNArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := agent.ParseRoute(args); err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				return hostDone(onHost(ctx, s, host, func(ctx context.Context, h pb.HostControlClient) (*pb.HostReply, error) {
					return h.AddRoute(ctx, &pb.RouteRequest{Route: strings.Join(args, " ")})
				}))
			})
		},
	}
	hostFlag(cmd, &host)
	return cmd
}

func hostFlag(cmd *cobra.Command, host *string) {
	cmd.Flags().StringVar(host, "host", "", "on which host")
	must(cmd.MarkFlagRequired("host"))
}

func routeRemoveCommand(c *cli) *cobra.Command {
	var host string
	cmd := &cobra.Command{
		Use: "rm --host HOST DESTINATION", Short: "Remove a route that was added",
		Example: "  cairn route rm --host host-1 10.255.0.9",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := agent.ParseDestination(args[0]); err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				return hostDone(onHost(ctx, s, host, func(ctx context.Context, h pb.HostControlClient) (*pb.HostReply, error) {
					return h.RemoveRoute(ctx, &pb.RouteRequest{Route: args[0]})
				}))
			})
		},
	}
	hostFlag(cmd, &host)
	return cmd
}

// routeView is a row of `cairn route ls`.
type routeView struct {
	Host string `json:"host"`
	agent.Route
}

func routeListCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "ls [HOST…]", Short: "List the routes of the storage network as the hosts' kernels have them",
		Example: "  cairn route ls host-1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				reports, err := s.netReports(ctx, args)
				if err != nil {
					return err
				}
				views, rows := []routeView{}, [][]string{}
				for _, r := range reports {
					if r.Network == nil {
						continue
					}
					for _, rt := range r.Network.Routes {
						views = append(views, routeView{r.Host, rt})
						rows = append(rows, []string{r.Host, rt.To, rt.Owner, fmt.Sprint(rt.Metric), strings.Join(rt.Hops, ", ")})
					}
				}
				return out.show(views, []string{"HOST", "TO", "OWNER", "METRIC", "NEXT HOPS"}, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

const watchRoutesEvery = 250 * time.Millisecond

func routeWatchCommand(c *cli) *cobra.Command {
	var out outputFlag
	var once bool
	cmd := &cobra.Command{
		Use: "watch [HOST…]", Short: "Show what happens to the hosts' networks, in order, with the cause",
		Example: "  cairn route watch\n  cairn route watch --once -o json host-1",
		RunE: func(cmd *cobra.Command, args []string) error {
			if out.format != "json" && out.format != "table" {
				return usagef("-o %s is not a format: table or json", out.format)
			}
			s, err := c.connect()
			if err != nil {
				return err
			}
			err = watchRoutes(cmd.Context(), s, args, out.format == "json", once)
			if cerr := s.meta.Close(); err == nil {
				err = cerr
			}
			return err
		},
	}
	out.register(cmd)
	cmd.Flags().BoolVar(&once, "once", false, "show what has happened and end")
	return cmd
}

// watchRoutes prints events until ctx ends; a host that does not answer is asked
// again. A host process that was started anew counts from 1 again.
func watchRoutes(ctx context.Context, s *session, only []string, asJSON, once bool) error {
	last := map[string]uint64{}
	t := time.NewTicker(watchRoutesEvery)
	defer t.Stop()
	for {
		hosts, err := s.hosts(ctx)
		if ctx.Err() != nil {
			return nil // told to end
		}
		if err != nil {
			return err
		}
		var events []agent.Event
		for _, h := range hosts {
			if len(only) > 0 && !slices.Contains(only, h.Host.Name) {
				continue
			}
			var evs []agent.Event
			err := askNet(ctx, h.Host, &evs, func(ctx context.Context, c pb.HostControlClient) (*pb.NetReply, error) {
				return c.NetEvents(ctx, &pb.NetRequest{After: last[h.Host.Name]})
			})
			if err != nil && once {
				return err
			}
			if n := len(evs); n > 0 {
				last[h.Host.Name] = evs[n-1].Seq
			}
			events = append(events, evs...)
		}
		slices.SortStableFunc(events, func(a, b agent.Event) int { return a.Time.Compare(b.Time) })
		for _, e := range events {
			if asJSON {
				if err := json.NewEncoder(os.Stdout).Encode(e); err != nil {
					return err
				}
				continue
			}
			fmt.Printf("%s  %-10s  #%-5d %s  [%s]\n", e.Time.Format("15:04:05.000"), e.Node, e.Seq, e.What, dash(e.Cause))
		}
		if once {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// netWait bounds the wait for one host's answer about its network.
const netWait = 2 * time.Second

// askNet asks one host and reads its JSON.
func askNet(ctx context.Context, h *pb.Host, into any, ask func(context.Context, pb.HostControlClient) (*pb.NetReply, error)) error {
	ctx, cancel := context.WithTimeout(ctx, netWait)
	defer cancel()
	r, err := callHost(ctx, h, ask)
	if err != nil {
		return err
	}
	if err := status.New(status.Kind(r.Status), r.Detail); err != nil {
		return err
	}
	if err := json.Unmarshal(r.Json, into); err != nil {
		return status.Errorf(status.Corrupt, "host %s answers what is no JSON: %w", h.Name, err)
	}
	return nil
}
