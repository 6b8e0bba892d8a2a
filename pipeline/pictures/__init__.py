"""Pictures for people to look at: contact sheets, class colours, boxes."""
