package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
)

// completeSnapshots completes VOLUME@SNAPSHOT, and the volumes that have some, for
// the first n arguments; n < 0: for all.
func (c *cli) completeSnapshots(n int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var names []string
		if n < 0 || len(args) < n {
			_ = c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error { // no completion without a cluster
				rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
				for _, v := range rep.GetVolumes() {
					for _, w := range snapshotsOf(v, nil) {
						names = append(names, w.Volume+"@"+w.Name)
					}
				}
				return err
			})
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
